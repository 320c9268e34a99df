"""Equalized products against the function itself, and scales against numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc

pytestmark = pytest.mark.ci


def spread(tree, decades=4.0, seed=0):
    """Normal values whose channels, along the last axis, differ by up to ``decades``."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return treedef.unflatten(
        [
            jnp.asarray(
                rng.normal(size=x.shape) * 10 ** rng.uniform(-decades, 0, x.shape[-1:]), x.dtype
            )
            for x in leaves
        ]
    )


def dense(p, x):
    return jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"] + p["c"]


@pytest.fixture(scope="module")
def layers():
    p = {"w": jnp.ones((3, 5)), "b": jnp.ones(5), "v": jnp.ones((5, 2)), "c": jnp.ones(2)}
    return spread(p), jnp.asarray(np.random.default_rng(1).normal(size=(7, 3)), jnp.float32)


class Net(nn.Module):
    """Convolutions, one of them depthwise, and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = nn.leaky_relu(nn.Conv(6, (3, 3), feature_group_count=6)(x), 0.25)
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = jnp.maximum(nn.Conv(4, (1, 1), use_bias=False)(x), 0)
        return nn.Dense(3)(nn.avg_pool(x, (2, 2)).mean((1, 2)))


@pytest.fixture(scope="module")
def net():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    params = spread(jax.eval_shape(Net().init, jax.random.key(1), x))
    return params, x, jc.equalize(Net().apply, params, x)


def test_known_scales(layers):
    p, x = layers
    rw = jc.equalize(dense, p, x, exact=False)
    r1, r2 = np.abs(np.asarray(p["w"])).max(0), np.abs(np.asarray(p["v"])).max(1)
    s = np.sqrt(r1 * r2) / r2
    np.testing.assert_allclose(rw.params["w"], p["w"] / s, rtol=1e-4)
    np.testing.assert_allclose(rw.params["b"], p["b"] / s, rtol=1e-4)
    np.testing.assert_allclose(rw.params["v"], p["v"] * s[:, None], rtol=1e-4)
    np.testing.assert_array_equal(rw.params["c"], p["c"])
    assert rw.check(dense, x).relative < 1e-5
    assert list(rw.skipped) == ["v"]


@pytest.mark.slow
def test_powers_of_two_keep_every_bit(net):
    _params, x, rw = net
    assert rw.check(Net().apply, x, tolerance=0.0).absolute == 0
    assert rw.function(Net.apply) is Net.apply
    assert list(rw.skipped) == ["params/Dense_0/kernel"]
    assert len(rw.factors) == 6  # four weights and two biases
    for factor in rw.factors.values():
        np.testing.assert_array_equal(np.frexp(np.asarray(factor))[0], 0.5)


def test_ranges_match_in_a_whole_net(net):
    _, _, rw = net
    w = {k: np.abs(np.asarray(v["kernel"])) for k, v in rw.params["params"].items()}
    pairs = [
        (w["Conv_0"].max((0, 1, 2)), w["Conv_1"].max((0, 1, 2))),
        (w["Conv_1"].max((0, 1, 2)), w["Conv_2"].max((0, 1, 3))),
        (w["Conv_2"].max((0, 1, 2)), w["Dense_0"].max(1)),
    ]
    for first, second in pairs:
        # Scales are rounded to powers of two, so a factor of two remains on each side.
        assert np.all(np.abs(np.log2(first / second)) <= 1 + 1e-5)


def test_undo_gives_every_bit_back(net):
    params, _, rw = net
    jax.tree.map(np.testing.assert_array_equal, rw.undo(rw.params), params)


def test_several_readers_share_one_range():
    def fn(p, x):
        h = jax.nn.relu(x @ p["w"])
        return h @ p["a"], p["b"].T @ h.T

    p = spread({"w": jnp.ones((3, 4)), "a": jnp.ones((4, 2)), "b": jnp.ones((4, 3))})
    x = jnp.ones((2, 3))
    rw = jc.equalize(fn, p, x, exact=False)
    r1 = np.abs(np.asarray(p["w"])).max(0)
    r2 = np.maximum(*(np.abs(np.asarray(p[k])).max(1) for k in "ab"))
    np.testing.assert_allclose(rw.params["b"], p["b"] * np.sqrt(r1 / r2)[:, None], rtol=1e-4)
    rw.check(fn, x, tolerance=1e-5)


def test_channels_of_zeros_stay(layers):
    p, x = layers
    p = {**p, "w": p["w"].at[:, 1].set(0), "v": p["v"].at[2].set(0)}
    rw = jc.equalize(dense, p, x)
    np.testing.assert_array_equal(rw.factors["w"][0, 1:3], 1)
    assert rw.check(dense, x).absolute == 0
    assert np.isfinite(np.concatenate([np.ravel(w) for w in jax.tree.leaves(rw.params)])).all()


def test_a_gate_leaves_the_other_branch_linear():
    def fn(p, x):
        return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]

    p = spread({"gate": jnp.ones((3, 4)), "up": jnp.ones((3, 4)), "down": jnp.ones((4, 3))})
    rw = jc.equalize(fn, p, jnp.ones((2, 3)))
    assert set(rw.factors) == {"up", "down"} and "not positively homo" in rw.skipped["gate"]
    assert rw.check(fn, jnp.ones((2, 3))).absolute == 0


def test_gradients_scale_inversely(layers):
    p, x = layers
    rw = jc.equalize(dense, p, x)
    loss = lambda p: (dense(p, x) ** 2).sum()
    old, new = jax.grad(loss)(p), jax.grad(loss)(rw.params)
    jax.tree.map(np.testing.assert_array_equal, rw.tree(old, power=-1), new)
    squares = jax.tree.map(jnp.square, old)
    wanted = jax.tree.map(jnp.square, new)
    jax.tree.map(np.testing.assert_array_equal, rw.tree(squares, power=-2), wanted)
    masks = jax.tree.map(lambda w: w > 0, p)
    jax.tree.map(np.testing.assert_array_equal, rw.tree(masks), masks)
    with pytest.raises(ValueError, match="power=-1"):
        rw.tree(old)


def test_half_precision_and_remat(layers):
    p, x = layers
    p = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
    fn = jax.checkpoint(lambda p, x: dense(p, x.astype(jnp.bfloat16)))
    rw = jc.equalize(fn, p, x)
    assert rw.params["w"].dtype == jnp.bfloat16
    assert rw.check(fn, x).absolute == 0


def error(fn, params, x):
    small = jc.compress(params, jc.quantize("int8", per="tensor"), uses=jc.uses(fn, params, x))
    want = fn(params, x)
    return float(jnp.linalg.norm(jc.lift(fn)(small, x) - want) / jnp.linalg.norm(want))


def test_int8_per_tensor_is_better(layers):
    _, x = layers
    rng = np.random.default_rng(3)
    s = 10 ** np.linspace(-4, 0, 5)
    p = {"w": rng.normal(size=(3, 5)) * s, "b": s, "v": rng.normal(size=(5, 2)) / s[:, None]}
    p = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), {**p, "c": np.ones(2)})
    rw = jc.equalize(dense, p, x)
    before, after = error(dense, p, x), error(dense, rw.params, x)
    assert before > 0.3 and after < 0.02


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (8, 8):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.mark.slow
def test_fold_then_equalize_then_quantize():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    params = spread(jax.eval_shape(Normed().init, jax.random.key(1), x), decades=0)
    # Channels that leave the first norm small are read by large weights.
    std = 10 ** jnp.linspace(-2.0, 2.0, 8)
    params["batch_stats"]["BatchNorm_0"]["var"] = std**2
    params["batch_stats"]["BatchNorm_1"]["var"] = jnp.ones(8)
    params["params"]["BatchNorm_0"]["bias"] /= std
    params["params"]["Conv_1"]["kernel"] *= std[:, None]
    fn = Normed().apply
    folded = jc.fold_norms(fn, params, x)
    g = folded.function(fn)
    rw = jc.equalize(g, folded.params, x)
    assert isinstance(folded, jc.Rewrite) and isinstance(rw, jc.Rewrite)
    np.testing.assert_allclose(rw.function(g)(rw.params, x), fn(params, x), rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(folded.undo(rw.undo(rw.params))) == jax.tree.structure(params)
    assert error(g, rw.params, x) < error(g, folded.params, x) / 2


@pytest.mark.parametrize("channels_last", [True, False])
def test_flattened_channels(channels_last):
    def fn(p, x):
        h = jax.nn.relu(jnp.einsum("nhc,cd->nhd" if channels_last else "nhc,cd->ndh", x, p["w"]))
        return jnp.maximum(h.reshape(2, -1) + p["b"], 0) @ p["v"]

    p = spread({"w": jnp.ones((2, 4)), "b": jnp.ones(12), "v": jnp.ones((12, 5))})
    x = jax.random.normal(jax.random.key(0), (2, 3, 2))
    rw = jc.equalize(fn, p, x, exact=False)
    r1 = np.abs(np.asarray(p["w"])).max(0)
    order = (3, 4) if channels_last else (4, 3)
    r2 = np.abs(np.asarray(p["v"])).max(1).reshape(order).max(0 if channels_last else 1)
    s = np.sqrt(r1 / r2)
    full = np.tile(s, 3) if channels_last else np.repeat(s, 3)
    np.testing.assert_allclose(rw.params["w"], p["w"] / s, rtol=1e-4)
    np.testing.assert_allclose(rw.params["b"], p["b"] / full, rtol=1e-4)
    np.testing.assert_allclose(rw.params["v"], p["v"] * full[:, None], rtol=1e-4)
    assert jc.equalize(fn, p, x).check(fn, x).absolute == 0


def test_a_vmapped_module_is_equalized_as_it_is():
    eqx = pytest.importorskip("equinox")
    arrays, static = eqx.partition(eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(0)), eqx.is_array)
    params, x = spread(arrays), jnp.ones((5, 4))

    def fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    rw = jc.equalize(fn, params, x)
    assert list(rw.skipped) == ["layers/2/weight"]
    assert rw.check(fn, x).absolute == 0
    assert jax.tree.structure(rw.params) == jax.tree.structure(params)
