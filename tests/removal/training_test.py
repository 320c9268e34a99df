"""Masks as a compression, and parameters and moments on their way from masked to smaller ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from jaxopt_compress.tree import named_leaves
from tests.removal import law

pytestmark = pytest.mark.ci

X = jnp.asarray(np.random.default_rng(1).normal(size=(8, 3)), jnp.float32)
SHAPES = {"b": jnp.ones(6), "n": jnp.arange(6), "v": jnp.ones((6, 2)), "w": jnp.ones((3, 6))}
PARAMS = law.values(SHAPES)


def net(p, x):
    return jax.nn.relu((x @ p["w"] + p["b"]) * p["n"]) @ p["v"]


@pytest.fixture(scope="module")
def plan():
    return jc.find_groups(net, PARAMS, X).plan({"w:1": [0, 4]})


@pytest.fixture(scope="module")
def uses():
    return jc.uses(net, PARAMS, X)


def test_views_and_stored_form(plan, uses):
    c, zeros = plan.compression, law.masked(PARAMS, plan.kept)
    state = c.init(PARAMS, uses=uses)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(c.apply)(PARAMS, state), zeros)
    small = jc.compress(PARAMS, c, state=state)
    kinds = {path: type(x).__name__ for path, x in named_leaves(small)}
    # Integers are no weights: they are cut by the rewrite, and are not masked.
    assert kinds == {"b": "SparseArray", "n": "ArrayImpl", "v": "SparseArray", "w": "SparseArray"}
    jax.tree.map(np.testing.assert_array_equal, jc.materialize(small), zeros)
    assert small["w"].values.shape[-1] == 12 and small["b"].values.shape == (4,)
    law.close(jc.lift(net)(small, X), net(zeros, X), 1e-6)


def test_chains(plan, uses):
    both = jc.chain(plan.compression, jc.quantize("int8", where=("w", "v")))
    small = jc.compress(PARAMS, both, uses=uses)
    assert type(small["w"].codes).__name__ == "SparseArray"
    gone = np.asarray(jc.materialize(small)["w"])[:, [0, 4]]
    assert not gone.any()
    later = jc.chain(jc.quantize("int8", where=("w", "v")), plan.compression)
    again = jc.materialize(jc.compress(PARAMS, later, uses=uses))
    assert not np.asarray(again["v"])[[0, 4]].any() and np.asarray(again["v"])[1].any()


def test_masked_training_and_training_of_smaller_parameters_agree(plan, uses):
    """Adam's moments, too, are those of the entries that stay."""
    floats = {k: v for k, v in PARAMS.items() if k != "n"}
    net_of = lambda p, x: net({**p, "n": PARAMS["n"]}, x)
    groups = jc.find_groups(net_of, floats, X)
    plan = groups.plan({"w:1": [0, 4]})
    target = jnp.ones((8, 2))

    def trained(fn, params, tx, view, steps=5, state=None):
        state = tx.init(params) if state is None else state

        @jax.jit
        def step(params, state):
            loss = lambda p: jnp.square(fn(p, X) - target).mean()
            updates, state = tx.update(jax.grad(loss)(view(params, state)), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(steps):
            params, state = step(params, state)
        return params, state

    c = plan.compression
    masked, state = trained(net_of, floats, jc.compressed_training(optax.adam(0.05), c), c.view)
    rewrite = plan.rewrite(floats)
    own = lambda params, state: params
    smaller, other = trained(rewrite.function(net_of), rewrite.params, optax.adam(0.05), own)
    law.close(smaller, rewrite.tree(masked), 1e-5)
    moments = optax.tree_utils.tree_get(state, "mu")
    law.close(optax.tree_utils.tree_get(other, "mu"), rewrite.tree(moments), 1e-5)
    law.close(rewrite.undo(smaller), c.view(masked, state), 1e-5)


def test_states_of_other_plans_are_refused(plan, uses):
    other = jc.find_groups(net, PARAMS, X).plan({"w:1": [0, 3]}).compression
    with pytest.raises(ValueError, match="the recipe asks for remove"):
        other.apply(PARAMS, plan.compression.init(PARAMS, uses=uses))
    with pytest.raises(ValueError, match=r"'b' of shape \(4,\) had shape \(6,\)"):
        plan.compression.init(plan.rewrite().params)


def test_a_rewrite_is_one_and_folds_after_another(plan):
    rewrite = plan.rewrite()
    assert isinstance(rewrite, jc.Rewrite)
    again = jc.find_groups(rewrite.function(net), rewrite.params, X).plan({"w:1": [1]}).rewrite()
    assert again.params["w"].shape == (3, 3)
    g = again.function(rewrite.function(net))
    zeros = rewrite.undo(again.undo(again.params))
    law.close(g(again.params, X), net(zeros, X), 1e-6)


def test_integers_of_removed_indices_are_cut(plan):
    assert plan.rewrite().params["n"].tolist() == [1, 2, 3, 5]
    assert plan.check(PARAMS, X).relative < 1e-6


def cached(p, cache, x):
    """One step of attention, which writes its key and value into a cache."""
    k = cache["k"].at[2].set(x @ p["k"])
    v = cache["v"].at[2].set(x @ p["v"])
    out = jax.nn.softmax(k @ (x @ p["q"])) @ v
    return out @ p["o"], {"k": k, "v": v}


def test_caches_shrink_if_they_follow():
    params = law.values({name: jnp.ones((3, 5)) for name in "kqv"} | {"o": jnp.ones((5, 2))})
    cache, x = law.values({"k": jnp.ones((4, 5)), "v": jnp.ones((4, 5))}, seed=2), X[0]
    assert not jc.find_groups(cached, params, cache, x)
    groups = jc.find_groups(cached, params, cache, x, follow=("in/0/**", "out/1/**"))
    assert {k: len(g) for k, g in groups.items()} == {"k:1": 5, "v:1": 5}
    plan = groups.plan({"k:1": [0], "v:1": [1, 2]})
    rewrite = plan.rewrite()
    small = rewrite.argument(0, cache)
    assert jax.tree.map(jnp.shape, small) == {"k": (4, 4), "v": (4, 3)}
    out, new = jax.jit(rewrite.function(cached))(rewrite.params, small, x)
    wanted, whole = cached(rewrite.undo(rewrite.params), cache, x)
    law.close(out, wanted, 1e-6)
    law.close(new, rewrite.argument(0, whole), 1e-6)
    assert plan.check(params, cache, x).relative < 1e-6
    with pytest.raises(ValueError, match=r"'in/0/k' has shape \(4, 5\), .* argument\(\)"):
        rewrite.function(cached)(rewrite.params, cache, x)


def norm(p, stats, x):
    h = x @ p["w"]
    mean, var = h.mean(0), h.var(0)
    new = {"mean": 0.9 * stats["mean"] + 0.1 * mean, "var": 0.9 * stats["var"] + 0.1 * var}
    return jax.nn.relu((h - mean) * jax.lax.rsqrt(var + 1e-3) * p["s"] + p["b"]) @ p["v"], new


def test_averages_of_batch_norms_follow():
    params = law.values({**SHAPES, "s": jnp.ones(6)})
    del params["n"]
    stats = law.values({"mean": jnp.ones(6), "var": jnp.ones(6)})
    groups = jc.find_groups(norm, params, stats, X, follow=("in/0/*", "out/1/*"))
    plan = groups.plan({"w:1": [1, 5]})
    assert plan.check(params, stats, X).relative < 1e-5
    rewrite = plan.rewrite()
    _, new = rewrite.function(norm)(rewrite.params, rewrite.argument(0, stats), X)
    assert jax.tree.map(jnp.shape, new) == {"mean": (4,), "var": (4,)}


def test_smaller_parameters_are_quantized_and_lifted(plan):
    rewrite = plan.rewrite()
    g = rewrite.function(net)
    small = jc.compress(
        rewrite.params, jc.quantize("int8", where=("w", "v")), uses=jc.uses(g, rewrite.params, X)
    )
    got = jc.lift(g, on_fallback="error")(small, X)
    law.close(got, g(jc.materialize(small), X), 1e-5)


def test_dtypes_are_those_of_the_parameters_passed(plan):
    rewrite = plan.rewrite()
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, rewrite.params
    )
    out = jax.jit(rewrite.function(net))(half, X.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    law.close(out.astype(jnp.float32), net(rewrite.undo(rewrite.params), X), 0.05)
