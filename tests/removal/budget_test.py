"""Operations, scores and the order in which units go."""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.removal.budget import Offer, in_order, worst
from tests.removal import law


def two(p, x):
    """A wide hidden layer and a narrow one."""
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]


PARAMS = law.values({"a": jnp.ones((5, 32)), "b": jnp.ones((32, 8)), "c": jnp.ones((8, 3))})
X = jnp.ones((2, 5))


def test_operations_are_counted():
    groups = jc.find_groups(two, PARAMS, X)
    assert groups.plan({}).flops[0] == 2 * 2 * (5 * 32 + 32 * 8 + 8 * 3)
    assert groups["a:1"].flops == 2 * 2 * (5 + 8) and groups["b:1"].flops == 2 * 2 * (32 + 3)


def test_operations_of_convolutions_and_scans():
    def fn(p, x):
        y = jax.lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0]
        return y, nn.Conv(6, (3, 3), feature_group_count=2, padding="VALID").apply(p["c"], p["x"])

    image = jnp.ones((1, 5, 5, 4))
    conv = {"params": {"kernel": jnp.ones((3, 3, 2, 6)), "bias": jnp.ones(6)}}
    params = {"w": jnp.ones((3, 4, 4)), "c": conv, "x": image}
    scan, conv = 3 * 2 * 2 * 4 * 4, 2 * 9 * 6 * 9 * 2
    assert jc.find_groups(fn, params, jnp.ones((2, 4))).plan({}).flops[0] == scan + conv


@pytest.mark.parametrize("reduce", ["l2", "sum", "mean", "max"])
def test_scores_of_units_by_numpy(reduce):
    groups = jc.find_groups(two, PARAMS, X)
    entries = [
        np.concatenate([np.abs(PARAMS["a"][:, i]), np.abs(PARAMS["b"][i])]) for i in range(32)
    ]
    by = {
        "l2": lambda e: np.sqrt(np.square(e).sum()), "sum": np.sum, "mean": np.mean, "max": np.max
    }  # fmt: skip
    wanted = [by[reduce](e) for e in entries]
    np.testing.assert_allclose(groups.scores(reduce=reduce)["a:1"], wanted, rtol=1e-6)


def test_scores_read_gradients_and_uses():
    groups = jc.find_groups(two, PARAMS, X)
    grads = jax.tree.map(lambda x: x + 1, PARAMS)
    taylor = lambda p: jnp.abs(p.grad * p.dense())
    found = groups.scores(taylor, "sum", grads=grads)
    change = {k: np.abs(np.asarray(PARAMS[k] * grads[k])) for k in PARAMS}
    np.testing.assert_allclose(found["b:1"], change["b"].sum(0) + change["c"].sum(1), rtol=1e-6)
    with pytest.raises(ValueError, match=r"the score has shape \(\) for 'a' of shape \(5, 32\)"):
        groups.scores(lambda p: jnp.sum(p.value), uses=jc.uses(two, PARAMS, X))


def test_layouts_of_scores_are_those_of_the_call_that_groups_were_found_on():
    """Axes of ``out,in`` kernels would be assumed wrongly."""
    fn = lambda p, x: jax.nn.relu(x @ p["v"].T) @ p["w"].T
    params = {"v": jnp.ones((6, 4)), "w": jnp.ones((3, 6))}
    groups = jc.find_groups(fn, params, jnp.ones((2, 4)))
    seen = {}

    def score(parameter):
        seen[parameter.path] = parameter.layout.contracting
        return jnp.abs(parameter.value)

    groups.scores(score)
    assert seen == {"v": (-1,), "w": (-1,)}


def test_weights_times_slopes_are_activations_times_slopes():
    """To first order, what the loss changes by without a unit (Molchanov et al., 2017)."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(9, 5)), jnp.float32)

    def loss(params, gates):
        h = jax.nn.relu(jax.nn.relu(x @ params["a"]) * gates @ params["b"]) @ params["c"]
        return jnp.mean(jnp.square(h))

    slopes, wanted = jax.grad(loss, (0, 1))(PARAMS, jnp.ones(32))
    groups = jc.find_groups(two, PARAMS, X)
    found = groups.scores(lambda p: p.grad * p.dense(), "sum", grads=slopes, where="a")["a:1"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_scores_by_activations_and_norms():
    """By numpy: of the hidden activations, of scales alone, and by the loss in a plain loop."""
    params = {**PARAMS, "s": jnp.arange(1.0, 33.0)}
    fn = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) * p["s"] @ p["b"]) @ p["c"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(9, 5)), jnp.float32)
    groups = jc.find_groups(fn, params, x)
    measures = (jc.measures.zeros(), jc.measures.means())
    stats = jc.calibrate(fn, params, [x], measures=measures)
    found = {"uses": jc.uses(fn, params, x), "stats": stats}
    hidden = np.maximum(np.asarray(x @ params["a"]), 0) * np.arange(1, 33)
    second = np.maximum(hidden @ np.asarray(params["b"]), 0)
    by = {
        jc.scores.apoz: lambda h: (h != 0).mean(0),
        jc.scores.mean_activation: lambda h: h.mean(0),
    }
    for score, of in by.items():
        own = groups.scores(score(), "mean", where="c", **found)
        np.testing.assert_allclose(own["b:1"], of(second), rtol=1e-5)
        # Producers add the same to each unit, so that the order is that of the activations.
        both = groups.scores(score(), "sum", **found)["a:1"]
        np.testing.assert_allclose(both - 8 * of(hidden), (both - 8 * of(hidden))[0], rtol=1e-3)
    assert set(groups.scores(where="s")) == {"a:1"}
    np.testing.assert_array_equal(groups.scores(where="s")["a:1"], np.arange(1, 33))
    loss = lambda p, x: jnp.mean(jnp.square(fn(p, x)))
    got = groups.losses(loss, x, at_once=3)
    want = [
        loss({**params, "b": params["b"].at[:, i].set(0), "c": params["c"].at[i].set(0)}, x)
        for i in range(8)
    ]
    np.testing.assert_allclose(got["b:1"], want, rtol=1e-5)
    assert got["a:1"].shape == (32,)
    with pytest.raises(ValueError, match="there is no group 'z'"):
        groups.losses(loss, x, names=["z"])
    with pytest.raises(ValueError, match=r"'a' of shape \(5, 32\) reads its stats"):
        groups.scores(jc.scores.apoz(), uses=found["uses"])


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_a_budget_is_met_and_one_unit_less_would_not_meet_it(share):
    groups = jc.find_groups(two, PARAMS, X)
    plan = groups.plan(budget=jc.flops(share))
    before, after = plan.flops
    assert after <= share * before
    scores = groups.scores()
    for name, own in plan.units.items():
        others = np.delete(scores[name], own)
        assert max(scores[name][list(own)]) <= min(others)
    last = [
        {**plan.units, n: sorted(u, key=lambda i: scores[n][i])[:-1]} for n, u in plan.units.items()
    ]
    assert any(groups.plan(units).flops[1] > share * before for units in last)


def test_rounding():
    plan = jc.find_groups(two, PARAMS, X).plan(budget=jc.flops(0.4), round_to=8)
    assert {n: (32 if n == "a:1" else 8) - len(u) for n, u in plan.units.items()} == {"a:1": 8}


def test_order_by_hand():
    # Shares of what is left: 1/6, 2/5 of the first group; 1/4, 1/3, 1/2 of the second.
    first = Offer(np.array([3.0, 1.0, 2.0]), 1, 1, 1)
    second = Offer(np.ones(4), 1, 1, 1)
    assert in_order({"a": first, "b": second}) == ["a", "b", "b", "a", "b"]
    # A unit that saves twice as much goes earlier, and one that touches more products later.
    assert in_order({"a": first, "b": second._replace(saved=2)}) == ["b", "a", "b", "b", "a"]
    assert in_order({"a": first, "b": second._replace(products=3)}) == ["a", "a", "b", "b", "b"]
    assert worst(first, 2) == [1, 2] and worst(second._replace(multiple=3), 2) == [0]
    assert worst(first, 2, {1}) == [2, 0]


def test_scales_of_scores_do_not_matter():
    groups = jc.find_groups(two, PARAMS, X)
    scores = groups.scores()
    scaled = {name: s * (1e3 if name == "a:1" else 1) for name, s in scores.items()}
    budget = jc.flops(0.5)
    assert groups.plan(budget=budget, scores=scaled).units == groups.plan(budget=budget).units
    with pytest.raises(ValueError, match=r"scores of 'a:1' have shape \(2,\); .* 32 numbers"):
        groups.plan(budget=budget, scores={"a:1": np.ones(2)})


def test_no_axis_inside_is_emptied_by_a_budget():
    """The first two of eight units gate the others, and have the lowest scores."""

    def fn(p, x):
        h = x @ p["w"]
        return (h[:, :2].sum(1, keepdims=True) * jax.nn.relu(h)) @ p["v"]

    params = {"w": jnp.ones((3, 8)).at[:, :2].set(0.1), "v": jnp.ones((8, 2)).at[:2].set(0.1)}
    x = jnp.ones((2, 3))
    groups = jc.find_groups(fn, params, x)
    with pytest.raises(jc.NotRemovable, match="would be empty, such as one of length 2"):
        groups.plan({"w:1": [0, 1]})
    plan = groups.plan(budget=jc.flops(0.7))
    assert len({0, 1} & set(plan.units["w:1"])) == 1
    law.check(fn, params, (x,), plan)


@pytest.mark.parametrize("share", [0, 1, 1.5, True, "half"])
def test_shares(share):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        jc.flops(share)


class Transformer(nn.Module):
    """12 layers of 768 with a vocabulary of 32k."""

    scan: bool

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(32000, 768)
        x = embed(tokens)
        if self.scan:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 12}
            x, _ = nn.scan(nn.remat(Layer), **axes)()(x, None)
        else:
            for _ in range(12):
                x, _ = Layer()(x)
        return embed.attend(nn.LayerNorm()(x))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=12)(h, h)
        h = nn.gelu(nn.Dense(3072)(nn.LayerNorm()(x)))
        return x + nn.Dense(768)(h), None


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_a_transformer_is_analyzed_in_seconds(scan):
    model, tokens = Transformer(scan), jax.ShapeDtypeStruct((2, 128), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    start = time.process_time()
    groups = jc.find_groups(model.apply, params, tokens)
    assert time.process_time() - start < 10
    assert len(groups) == (6 if scan else 1 + 4 * 12 + 1)
    rng = np.random.default_rng(0)
    scores = {name: rng.uniform(0.5, 1, len(group)) for name, group in groups.items()}
    plan = groups.plan(budget=jc.flops(0.5), round_to=128, scores=scores)
    assert 0.4 < plan.flops[1] / plan.flops[0] <= 0.5
    assert all(len(kept) % 128 == 0 for axes in plan.kept.values() for kept in axes.values())


def test_entries_that_two_indices_take_count_once():
    fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["u"] + x @ p["w"]) @ p["w"].T
    params = law.values({"u": jnp.ones((4, 4)), "w": jnp.ones((3, 4))})
    groups = jc.find_groups(fn, params, jnp.ones((2, 3)))
    u, w = np.abs(params["u"]), np.abs(params["w"])
    wanted = u.sum(0) + u.sum(1) - np.diag(u) + w.sum(0)
    np.testing.assert_allclose(groups.scores(reduce="sum")["w:1"], wanted, rtol=1e-6)
    np.testing.assert_allclose(groups.scores(reduce="mean")["w:1"], wanted / 10, rtol=1e-6)
