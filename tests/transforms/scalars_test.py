"""Scalars for logs are those of the view, under jit, whatever the optimizer wraps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc

PARAMS = {
    "w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), "f4"),
    "bias": jnp.ones(8),
}
UNTIL = jc.bounds.percentile(90.0)


def test_scalars_are_those_of_the_view():
    prune = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.25))
    c = jc.chain(prune, jc.quantize("int8", bounds=UNTIL, per="tensor"))
    tx = optax.chain(jc.compressed_training(optax.sgd(0.1), c, layout="in,out"))
    state = tx.init(PARAMS)
    found = {k: float(x) for k, x in jax.jit(jc.scalars)(state, PARAMS).items()}
    view = np.asarray(c.view(PARAMS, state)["w"])
    w = np.asarray(PARAMS["w"])
    assert found["sparsity"] == found["w/sparsity"] == (view == 0).mean()
    assert (found["w/low"], found["w/high"]) == (view.min(), view.max())
    assert found["w/error"] == pytest.approx(np.linalg.norm(view - w) / np.linalg.norm(w), rel=1e-5)
    # What lies beyond the ends is seen at an end, more than half a step away.
    step = np.diff(np.unique(view)).min()
    assert 0 < found["w/clipped"] == (np.abs(view - np.where(view == 0, 0, w)) > 0.51 * step).mean()
    assert not any(name.startswith("bias") for name in found)
    of_view = jc.scalars(c.view(PARAMS, state), PARAMS)
    assert {k: float(x) for k, x in of_view.items()} == {
        k: x for k, x in found.items() if k != "w/clipped"
    }


@pytest.mark.ci
def test_weights_beside_rounded_activations_are_clipped_as_without():
    shares = []
    for activations in (None, "int8"):
        c = jc.quantize("int8", bounds=UNTIL, activations=activations)
        tx = jc.compressed_training(optax.sgd(0.1), c, layout="in,out")
        shares.append(float(jc.scalars(tx.init(PARAMS), PARAMS)["w/clipped"]))
    assert 0 < shares[0] == shares[1]


@pytest.mark.ci
def test_factors_and_learned_steps_are_followed():
    c = jc.chain(jc.low_rank(rank=2), jc.lsq("int4"))
    tx = jc.compressed_training(optax.sgd(0.1), c, layout="in,out")
    found = jc.scalars(tx.init(PARAMS), PARAMS)
    assert {"w/error", "w/u/clipped", "w/v/clipped"} <= set(found)
    assert 0 < float(found["w/error"]) < 1
