"""Sums that accelerators round to a short type before scales multiply them."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_compress.kernels import matmul
from jaxopt_compress.kernels.forms import ACCELERATORS, GPUS
from tests.kernels.dots_test import K, inputs, pack
from tests.kernels.products import integer_dot, planar_dot, scaled_dot

ROWS = 6
MODULE = sys.modules[matmul.__module__]


def on(platform):
    """The forms of a platform, on this one."""
    return lambda forms, default, *args: forms.get(platform, default)(*args)


def products(rng):
    """Products with one scale per column, as a function of `sums`, and its sums."""
    x, codes, scale, _ = inputs(rng, (), ROWS, None, jnp.bfloat16, -2, 1)
    exact = np.asarray(x, np.float64) @ codes
    own = jnp.asarray(codes, jnp.int8)
    words = jnp.asarray(pack(codes, 2, K))
    return (
        exact,
        scale,
        {
            "codes": lambda sums: scaled_dot(x, own, scale, sums=sums),
            "words": lambda sums: planar_dot(x, words, scale, bits=2, block=K, sums=sums),
        },
    )


@pytest.mark.parametrize("platform", ACCELERATORS)
@pytest.mark.parametrize("form", ["codes", "words"])
def test_rounded_once_before_scales(platform, form, monkeypatch):
    monkeypatch.setattr(MODULE, "on_each_platform", on(platform))
    exact, scale, forms = products(np.random.default_rng(0))
    got = np.asarray(forms[form](jnp.bfloat16), np.float64) / np.asarray(scale, np.float64)
    # By a whole roundoff at a tie that float32 sums decide otherwise, and by those of K products.
    assert np.all(np.abs(got - exact) <= 2.0**-8 * np.abs(exact) + 2.0**-16)
    assert np.any(np.abs(got - exact) > 2.0**-12 * np.abs(exact))
    whole = np.asarray(forms[form](None), np.float64) / np.asarray(scale, np.float64)
    assert np.all(np.abs(whole - exact) <= 2.0**-16 * (1 + np.abs(exact)))


def test_short_scales_multiply_weights_in_their_type(monkeypatch):
    """As written it is the product with the dense weight, which the compiler may rearrange."""
    monkeypatch.setattr(MODULE, "on_each_platform", on("tpu"))
    x, codes, scale, _ = inputs(np.random.default_rng(3), (), ROWS, None, jnp.bfloat16)
    own, scale = jnp.asarray(codes, jnp.int8), scale.astype(jnp.bfloat16)

    def run(scale):
        return scaled_dot(x, own, scale, sums=jnp.bfloat16).astype(jnp.bfloat16)

    dense = (jnp.asarray(codes, jnp.float32) * scale.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(run(scale), x @ dense)
    np.testing.assert_array_equal(jax.jit(run)(scale), x @ dense)
    factors = [e for e in jax.make_jaxpr(run)(scale).eqns if e.primitive.name == "mul"]
    assert [e.outvars[0].aval.dtype for e in factors] == [jnp.bfloat16]


def test_not_on_cpu():
    _, _, forms = products(np.random.default_rng(0))
    for form in forms.values():
        np.testing.assert_array_equal(form(jnp.bfloat16), form(None))


@pytest.mark.parametrize("platform", [*ACCELERATORS, "cpu"])
def test_integer_sums(platform, monkeypatch):
    monkeypatch.setattr(MODULE, "on_each_platform", on(platform))
    rng = np.random.default_rng(1)
    x, codes = (jnp.asarray(rng.integers(-128, 128, s), jnp.int8) for s in ((ROWS, K), (K, 8)))
    sums = np.asarray(x, np.int64) @ np.asarray(codes, np.int64)
    want = jnp.asarray(sums, jnp.float32)
    want = want.astype(jnp.bfloat16).astype(jnp.float32) if platform in GPUS else want
    scale = jnp.asarray(rng.uniform(0.5, 2, (1, 8)), jnp.float32)
    got = integer_dot(x, codes, scale, sums=jnp.bfloat16)
    np.testing.assert_array_equal(got, want * scale)


def test_derivatives_do_not_round(monkeypatch):
    monkeypatch.setattr(MODULE, "on_each_platform", on("tpu"))
    x, codes, scale, _ = inputs(np.random.default_rng(2), (), ROWS, None, jnp.bfloat16)
    own = jnp.asarray(codes, jnp.int8)
    grad = jax.grad(lambda scale: scaled_dot(x, own, scale, sums=jnp.bfloat16).sum())(scale)
    exact = (np.asarray(x, np.float64) @ codes).sum(0, keepdims=True)
    size = np.abs(np.asarray(x, np.float64) @ codes).sum(0, keepdims=True)
    assert np.all(np.abs(np.asarray(grad) - exact) <= 2.0**-8 * size)
