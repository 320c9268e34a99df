"""Gradients of views that round activations, inside of optax's wrappers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from tests.quantization.cases import normal

pytestmark = pytest.mark.ci

PARAMS = {"w": jnp.asarray(normal(32, 16)), "bias": jnp.zeros(16)}
X = jnp.asarray(normal(8, 32, seed=1))
LOSS = jc.lift(lambda p, x: jnp.mean((x @ p["w"] + p["bias"] - 1) ** 2))
METHODS = {
    "int8": jc.quantize("int8", activations="int8"),
    "backward": jc.quantize("int4", group_size=8, activations="int8", backward="int8"),
    "calibrated": jc.quantize("int8", activations=jc.activations("int8", "calibrated")),
    "weights alone": jc.quantize("int8"),
    "learned weights": jc.lsq("int4"),
}
LEARNED = {
    "lsq": jc.lsq("int4", activations=jc.activations("int8", "learned")),
    "pact": jc.lsq("int4", activations=jc.activations("uint4", "clipped", high=3.0)),
}
WRAPPERS = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "ema": lambda tx: optax.chain(optax.ema(0.9), tx),
    "decay": lambda tx: optax.chain(optax.add_decayed_weights(0.1), tx),
}


def trained(tx, c, steps, convert=jc.weight_gradients):
    """Parameters after some steps on one batch."""

    @jax.jit
    def step(params, state):
        grads = convert(jax.grad(LOSS)(c.view(params, state), X))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def training(c):
    stats = jc.calibrate(lambda p, x: x @ p["w"], PARAMS, [X])
    return jc.compressed_training(optax.adam(1e-2), c, stats=stats)


@pytest.mark.ci
@pytest.mark.fast("int8", "calibrated", "learned weights")
@pytest.mark.parametrize("name", METHODS)
def test_either_form(name):
    """Gradients of the view and those of weights make the same step."""
    c = METHODS[name]
    want = trained(training(c), c, 2, convert=lambda grads: grads)
    chex.assert_trees_all_equal(trained(training(c), c, 2), want)


OTHERS = ("backward", "calibrated", "learned weights")
KINDS = [pytest.param(name, marks=pytest.mark.slow if name in OTHERS else []) for name in METHODS]


@pytest.mark.fast("int8-MultiSteps", "backward-ema", "learned weights-decay")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", KINDS)
def test_wrappers(name, wrapper):
    c = METHODS[name]
    params = trained(WRAPPERS[wrapper](training(c)), c, 4)
    assert not np.array_equal(params["w"], PARAMS["w"])
    if wrapper == "MultiSteps":
        # The mean of two equal gradients is that gradient, in a program that rounds differently.
        chex.assert_trees_all_close(params, trained(training(c), c, 2), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", LEARNED)
def test_learned_steps_are_not_left_behind(name):
    c = LEARNED[name]
    with pytest.raises(ValueError, match=r"'w' .* its activations have a learned step"):
        trained(training(c), c, 1)


@pytest.mark.slow
def test_sums_over_batches():
    """What to do instead: gradients of a view add up."""
    c = LEARNED["lsq"]
    tx = training(c)
    state = tx.init(PARAMS)
    view = c.view(PARAMS, state)
    grads = [jax.grad(LOSS)(view, x) for x in (X[:4], X[4:])]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    updates, new = tx.update(mean, state, PARAMS)
    assert np.any(updates["w"]) and not np.array_equal(
        new.compression.learned["w"]["input"]["scale"],
        state.compression.learned["w"]["input"]["scale"],
    )


def test_factors_have_no_gradient_of_their_product():
    c = jc.chain(jc.low_rank(rank=4), jc.quantize("int8", activations="int8"))
    state = training(c).init(PARAMS)
    grads = jax.grad(LOSS)(c.view(PARAMS, state), X)
    with pytest.raises(TypeError, match="gradient of 'w' is a LowRankArray"):
        jc.weight_gradients(grads)
