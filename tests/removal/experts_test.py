"""Experts as units: the smaller function is the one in which a router skips them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxopt_compress as jc
from tests.removal import law

pytestmark = pytest.mark.ci

X = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)
PARAMS = law.values({"g": jnp.ones((4, 5)), "v": jnp.ones((5, 3, 4)), "w": jnp.ones((5, 4, 3))})


def answers(p, x):
    return jnp.einsum("bef,efd->bed", jax.nn.relu(jnp.einsum("bd,edf->bef", x, p["w"])), p["v"])


def soft(logits):
    return jax.nn.softmax(logits)


def best_two(logits):
    """The softmax is over the two best experts, as in Mixtral."""
    best, at = lax.top_k(logits, 2)
    return jnp.einsum("bk,bke->be", jax.nn.softmax(best), jax.nn.one_hot(at, 5))


def shares_of_best(logits):
    """The two largest shares of a softmax over all, scaled again to 1."""
    best, at = lax.top_k(jax.nn.softmax(logits), 2)
    best = best / best.sum(-1, keepdims=True)
    return (best[..., None] * jax.nn.one_hot(at, 5)).sum(1)


def routed(router):
    return lambda p, x: jnp.einsum("bed,be->bd", answers(p, x), router(x @ p["g"]))


@pytest.mark.parametrize("router", [soft, best_two, shares_of_best])
def test_removed_equals_skipped(router):
    fn, gone = routed(router), [1, 3]
    groups = jc.find_groups(fn, PARAMS, X)
    group = groups["w:0"]
    assert {(m.path, m.axis) for m in group.members} == {("g", 1), ("v", 0), ("w", 0)}
    assert len(group) == 5 and group.inexact and group.skippable
    assert "exact if skipped: " in groups.table()
    with pytest.raises(jc.NotRemovable, match="skip=True skips them"):
        groups.plan({"w:0": gone})
    plan = groups.plan({"w:0": gone, "w:2": [0]}, skip=True)
    rewrite = plan.rewrite()
    assert {k: x.shape for k, x in rewrite.params.items()} == {
        "g": (4, 3), "v": (3, 2, 4), "w": (3, 4, 2)
    }  # fmt: skip
    logits = jnp.where(np.isin(np.arange(5), gone), -jnp.inf, X @ PARAMS["g"])
    whole = rewrite.undo(rewrite.params)
    wanted = jnp.einsum("bed,be->bd", answers(whole, X), router(logits))
    law.close(jax.jit(rewrite.function(fn))(rewrite.params, X), wanted, 1e-5)
    assert plan.check(PARAMS, X).relative < 1e-5
    with pytest.raises(ValueError, match="masks do not skip units"):
        _ = plan.compression
    jax.grad(law.loss(rewrite.function(fn)))(rewrite.params, X)


def test_channels_of_a_layer_norm_go_together_with_experts():
    """Means over the stream count its removed channels, also where experts are skipped."""

    def normed(h):
        h = h - h.mean(-1, keepdims=True)
        return h * lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-6)

    def fn(p, x):
        return routed(soft)(p, normed(x @ p["e"]) * p["s"])

    shapes = {"e": (4, 8), "g": (8, 5), "w": (5, 8, 3), "v": (5, 3, 4), "s": (8,)}
    params = law.values({name: jnp.ones(shape) for name, shape in shapes.items()})
    plan = jc.find_groups(fn, params, X).plan({"w:0": [1], "e:1": [0, 3]}, skip=True)
    # Sums of some ten float32 numbers.
    assert not plan.inexact and plan.check(params, X).relative < 2e-6


def test_too_few_are_left():
    groups = jc.find_groups(routed(best_two), PARAMS, X)
    with pytest.raises(jc.NotRemovable, match="takes 2 entries, and fewer are left"):
        groups.plan({"w:0": [0, 1, 2, 3]}, skip=True)


def test_a_budget_takes_experts_if_it_may_skip():
    groups = jc.find_groups(routed(soft), PARAMS, X)
    assert "w:0" not in groups.plan(budget=jc.flops(0.7)).units
    scores = {name: np.arange(1.0, len(group) + 1) for name, group in groups.items()}
    plan = groups.plan(budget=jc.flops(0.3), scores=scores, skip=True)
    assert plan.units["w:0"][0] == 0 and plan.check(PARAMS, X).relative < 1e-5
