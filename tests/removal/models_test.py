"""The law on models of several libraries, which know nothing of removal."""

import jax
import jax.numpy as jnp
import pytest

import jaxopt_compress as jc
from tests.removal import law
from tests.removal.models import MODELS
from tests.removal.networks import CNN, IMAGE, LM, Gated, equinox_transformer, experts, linen

pytestmark = pytest.mark.ci


@pytest.mark.fast("mlp", "cnn")
@pytest.mark.parametrize("name", MODELS)
def test_masked_equals_removed(name):
    make, expected = MODELS[name]
    fn, params, x = make()
    groups = jc.find_groups(fn, params, x)
    assert {k.removeprefix("params/"): len(g) for k, g in groups.items()} == expected
    params = law.values(params)
    plan = law.every_third(groups)
    # Derivatives of norms amplify the rounding of what they divide by.
    law.check(fn, params, (x,), plan, rtol=2e-4)


def test_known_inexact_groups():
    """Experts compete in a softmax; Equinox's layer norms, by two passes, are exact."""
    for make, names in ((experts, ["g:1"]), (equinox_transformer, [])):
        fn, params, x = make()
        groups = jc.find_groups(fn, params, x)
        assert [k for k, g in groups.items() if g.inexact] == names


def test_rotary_halves_go_together():
    fn, params, x = linen(Gated(), (2, 5, 8))
    groups = jc.find_groups(fn, params, x)
    (queries,) = [m for m in groups["params/Dense_2/kernel:1"].members if "Dense_1" in m.path]
    # Of each of four heads of eight: an index of the first half, and its partner in the second.
    wanted = [sorted(8 * h + i + half for h in range(4) for half in (0, 4)) for i in range(4)]
    assert queries.indices.tolist() == wanted


@pytest.mark.slow
def test_scanned_and_written_out_layers_lose_the_same_units():
    """By magnitude, where all layers have the same parameters."""
    budget = jc.flops(0.6)
    fn, params, x = linen(LM(True), (2, 5), jnp.int32)
    scanned = jc.find_groups(fn, params, x)
    layers = {k: v for k, v in params["params"].items() if not k.startswith("ScanCheckpoint")}
    block = law.values(jax.tree.map(lambda v: v.update(shape=v.shape[1:]), _scanned(params)))
    stacked = jax.tree.map(lambda v: jnp.stack([v] * 3), block)
    layers = law.values(layers, seed=4)
    plan = scanned.plan(
        budget=budget,
        scores=scanned.scores(
            params={"params": {**layers, "ScanCheckpointBlock_0": stacked}}, reduce="sum"
        ),
    )
    written = {"params": {**layers, **{f"Block_{i}": block for i in range(3)}}}
    groups = jc.find_groups(LM(depth=3).apply, written, x)
    other = groups.plan(budget=budget, scores=groups.scores(reduce="sum"))
    assert plan.flops[0] == other.flops[0]
    name = "MultiHeadDotProductAttention_0/query/kernel"
    stack = plan.kept[f"params/ScanCheckpointBlock_0/{name}"]
    for i in range(3):
        assert {k + 1: v for k, v in other.kept[f"params/Block_{i}/{name}"].items()} == stack


def _scanned(params):
    return params["params"]["ScanCheckpointBlock_0"]


@pytest.mark.slow
def test_transformations_of_the_rewritten_function():
    fn, params, x = linen(CNN(), IMAGE)
    params = law.values(params)
    plan = law.every_third(jc.find_groups(fn, params, x))
    rewrite = plan.rewrite(params)
    g, zeros = rewrite.function(fn), rewrite.undo(rewrite.params)
    other = law.values(jnp.ones((5, *IMAGE[1:])), seed=3)
    law.close(g(rewrite.params, other), fn(zeros, other), 2e-5)
    mapped = jax.jit(jax.vmap(lambda x: g(rewrite.params, x[None])[0]))(other)
    law.close(mapped, fn(zeros, other), 2e-5)
    tangent = jax.jvp(lambda x: g(rewrite.params, x), (x,), (x,))
    law.close(tangent, jax.jvp(lambda x: fn(zeros, x), (x,), (x,)), 2e-5)
