"""Weights whose inputs have factors, in lifted functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def scaled(w, axes):
    """An int8 array with factors along some axes."""
    shape = [n if d - w.ndim in axes else 1 for d, n in enumerate(w.shape)]
    factors = jnp.asarray(RNG.uniform(0.5, 2.0, shape), jnp.float32)
    small = jc.compress({"w": w}, jc.quantize("int8", where="w"), layout="in,out")["w"]
    return jc.ScaledArray(small, factors)


ROW = normal(5, 8)


def split(p, x):
    return jnp.split(x @ p.reshape(8, 2, 3).transpose(1, 0, 2), 2)


def heads(p, x):
    return jnp.einsum("rhd,hdn->rn", x, p.reshape(2, 4, 6))


def experts(p, x):
    return jnp.einsum("erk,ekn->ern", x, p)


def conv(p, x, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, p, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


CASES = {
    "product": (lambda p, x: x @ p, (8, 6), (-2,), ROW),
    "transposed": (lambda p, x: x @ p.T, (6, 8), (-1,), ROW),
    "split": (split, (8, 6), (-2,), ROW),
    "half": (lambda p, x: x[:, :4] @ p[:4], (8, 6), (-2,), ROW),
    "heads": (heads, (8, 6), (-2,), normal(5, 2, 4)),
    "reversed": (lambda p, x: x @ p[::-1], (8, 6), (-2,), ROW),
    "lookup": (lambda p, i: p[i], (6, 8), (-1,), jnp.array([0, 5, 2])),
    "by-row": (lambda p, i: p[i], (6, 8), (-2,), jnp.array([0, 5, 2])),
    "experts": (experts, (3, 8, 4), (-3, -2), normal(3, 5, 8)),
    "scan": (
        lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p)[0],
        (3, 8, 8),
        (-3, -2),
        ROW,
    ),
    "convolution": (conv, (3, 3, 4, 6), (-2,), normal(2, 5, 5, 4)),
    "windowed": (conv, (3, 3, 4, 6), (-4, -2), normal(2, 5, 5, 4)),
    "grouped": (functools.partial(conv, groups=2), (3, 3, 2, 6), (-2,), normal(2, 5, 5, 4)),
    "depthwise": (functools.partial(conv, groups=4), (3, 3, 1, 8), (-1,), normal(2, 5, 5, 4)),
    "output": (lambda p, x: x @ p, (8, 6), (-1,), ROW),
}


@pytest.mark.filterwarnings("ignore::jaxopt_compress.FallbackWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_lifted_function_is_that_of_the_dense_array(name):
    fn, shape, axes, x = CASES[name]
    w = scaled(normal(*shape), axes)
    # What has no form of its own is materialized, with a warning.
    how = "warn" if name in ("by-row", "output") else "error"
    got = jax.jit(jc.lift(fn, on_fallback=how))(w, x)
    want = fn(w.materialize(), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


def test_activations_are_scaled_before_they_are_rounded():
    factors = jnp.array([[0.01], [1.0]])
    inner = jc.compress({"w": jnp.ones((2, 3))}, jc.quantize("int8"), layout="in,out")["w"]
    w = jc.ScaledArray(jc.InputQuantizedArray(inner, None, "int8"), factors)
    x = jnp.array([[100.0, 0.5]])
    got = jc.lift(lambda p, x: x @ p, on_fallback="error")(w, x)
    # A step of 1.0 / 127.5; rounded before, 0.5 would lie within half a step of 0.8.
    np.testing.assert_allclose(got, [[1.5] * 3], atol=2 / 127.5)


def test_factors_that_fit_nothing_are_refused():
    inner = jc.compress({"w": jnp.ones((4, 3))}, jc.quantize("int8"), layout="in,out")["w"]
    with pytest.raises(ValueError, match=r"array of shape \(4, 3\) has factors of shape \(2, 1\)"):
        _ = jc.ScaledArray(inner, jnp.ones((2, 1))).shape


@pytest.mark.fast("2")
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_scale_the_activation(groups):
    """Factors of input channels, one per group of outputs; nothing is decoded."""
    w = normal(3, 3, 4 // groups, 8)
    small = jc.compress({"w": w}, jc.quantize("int8"), layout="in,out")["w"]
    shape = (1, 1, 4 // groups, groups)
    factors = jnp.asarray(RNG.uniform(0.5, 2.0, shape), jnp.float32)
    w, x = jc.ScaledArray(small, factors), normal(2, 5, 5, 4)
    fn = functools.partial(conv, groups=groups)
    repeated = np.repeat(np.asarray(factors), 8 // groups, -1)
    np.testing.assert_allclose(w.materialize(), small.materialize() * repeated, rtol=1e-6)
    got = jc.lift(fn, on_fallback="error")(w, x)
    np.testing.assert_allclose(got, fn(w.materialize(), x), atol=2e-5)
    met = w.replace(array=jc.InputQuantizedArray(small, None, "int8"))
    rounded = jc.lift(fn, on_fallback="error")(met, x)
    np.testing.assert_allclose(rounded, got, atol=0.02 * float(jnp.abs(got).max()))
