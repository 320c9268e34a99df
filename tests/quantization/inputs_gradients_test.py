"""Gradients of learned steps, offsets and clipping values, against known answers and formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from jaxopt_compress.numerics.formats import format_of
from tests.quantization.learned import COTANGENT, X, answer, steady, views, with_learned

# A weight of 1 shows an activation as the product sees it.
EYE = {"w": jnp.eye(64)}
dot = lambda params, x: x @ params["w"]
lifted = jc.lift(dot)


def at_identity(c, stats=None):
    """``run(x, cotangent, **learned)``: a product with 1, and gradients at both arguments."""
    state = c.init(EYE, stats=stats)

    @jax.jit
    def run(x, cotangent, **own):
        learned = with_learned(state, weight={"scale": jnp.ones((1, 64))}, input=own).learned
        y, pull = jax.vjp(lambda learned, x: lifted(views(c, state)(EYE, learned), x), learned, x)
        grads, x_grad = pull(cotangent)
        return y, x_grad, grads["w"]["input"]

    return run


def test_gradients_of_lsq_plus():
    want = answer("lsq_plus_uint4")
    stats = jc.calibrate(dot, EYE, [X])
    run = at_identity(
        jc.lsq("int4", activations=jc.activations("uint4", "learned", offset=True)), stats
    )
    for i in range(len(X)):
        step, offset = (jnp.full((1, 1), want[k][i]) for k in ("scale", "offset"))
        y, x_grad, grads = run(X[i : i + 1], COTANGENT[i : i + 1], scale=step, offset=offset)
        np.testing.assert_allclose(y[0], want["y"][i], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(x_grad[0], want["grad_x"][i], rtol=1e-6)
        factor = 1 / math.sqrt(64 * 15)
        slopes = want["grad_scale"][i], want["grad_offset"][i]
        got = grads["scale"].item(), grads["offset"].item()
        np.testing.assert_allclose(got, np.multiply(slopes, factor), rtol=1e-4, atol=1e-6)


def test_gradients_of_pact():
    want = answer("pact_4bit")
    run = at_identity(jc.lsq("int4", activations=jc.activations("uint4", "clipped", high=2.0)))
    y, x_grad, grads = run(X, COTANGENT, alpha=jnp.full((1, 1), want["alpha"]))
    np.testing.assert_allclose(y, want["y"], rtol=1e-6)
    np.testing.assert_array_equal(x_grad, want["grad_x"])
    np.testing.assert_allclose(grads["alpha"].item(), want["grad_alpha"], rtol=1e-5)


def test_gradients_of_the_activations_of_dorefa():
    want = answer("dorefa_activation_4bit")
    c = jc.dorefa("binary", activations="uint4")
    state = c.init(EYE)
    assert not state.learned
    # The binary weight is 2 for 1 and -2 for 0, times the mean magnitude.
    leaf = c.view(EYE, optax_state(c, EYE))["w"].replace(weight=jnp.eye(64))
    y, pull = jax.vjp(lambda x: lifted({"w": leaf}, x), X)
    np.testing.assert_allclose(y, want["y"], rtol=1e-6)
    inner = np.asarray(X) != 1  # Where the range ends torch passes the gradient on.
    np.testing.assert_array_equal(np.asarray(pull(COTANGENT)[0])[inner], want["grad_x"][inner])


def optax_state(c, params):
    return jc.compressed_training(optax.sgd(0.1), c).init(params)


@pytest.mark.parametrize("inputs", ["int4", "uint3"])
def test_derivatives_are_the_formula(inputs):
    fmt, x = format_of(inputs), steady(1, 5, 64)
    c = jc.lsq("int4", activations=jc.activations(inputs, "learned"))
    stats = jc.calibrate(dot, EYE, [jnp.abs(x)])
    y, x_grad, grads = at_identity(c, stats)(x, COTANGENT[:5], scale=jnp.full((1, 1), 0.3))
    v = np.asarray(x) / np.float32(0.3)
    inside = (v > fmt.grid.low) & (v < fmt.grid.high)
    level = np.clip(np.round(v), fmt.grid.low, fmt.grid.high)
    np.testing.assert_allclose(y, level * 0.3, rtol=1e-6)
    np.testing.assert_array_equal(x_grad, np.where(inside, COTANGENT[:5], 0))
    slope = (np.where(inside, level - v, level) * COTANGENT[:5]).sum()
    want = slope / math.sqrt(64 * fmt.grid.high)
    np.testing.assert_allclose(grads["scale"].item(), want, rtol=1e-4)
