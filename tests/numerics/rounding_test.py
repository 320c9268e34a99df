"""Conversions that compilers cannot work around, against ml_dtypes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxopt_compress.numerics.rounding import seal, widen


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_seal_rounds_to_even_down_to_subnormals(dtype):
    rng = np.random.default_rng(1)
    x = np.float32(rng.normal(size=(9, 4096)) * 10.0 ** -np.arange(9)[:, None])
    halves = (np.arange(256, dtype=np.float32) - 128) / 2 * 2.0**-24
    for values in (x, halves, np.float32([0.0, -0.0, np.inf, -np.inf])):
        want = values.astype(dtype)
        eager = np.asarray(seal(jnp.asarray(values), dtype))
        wide = jax.jit(lambda x: seal(x, dtype).astype(jnp.float32))(values)
        assert eager.tobytes() == want.tobytes()
        assert np.asarray(wide).tobytes() == want.astype(np.float32).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_seal_of_values_of_that_dtype_changes_none(dtype):
    x = jnp.asarray([0.0, -0.0, 1.5, -3e-5, 1e-7, np.inf, np.nan], dtype)
    assert np.asarray(seal(x, dtype)).tobytes() == np.asarray(x).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_seal_has_the_derivative_of_a_conversion(dtype):
    x, weight = jnp.asarray([1.5, 1e-6, -3e-5]), jnp.asarray([1.0, 2.0, 3.0])
    loss = lambda x: jnp.sum(seal(x, dtype).astype(jnp.float32) * weight)
    np.testing.assert_array_equal(jax.grad(loss)(x), weight)
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(loss)))(x[None]), weight[None])
    assert jax.jvp(loss, (x,), (jnp.ones(3),))[1] == 6
    np.testing.assert_array_equal(jax.hessian(loss)(x), np.zeros((3, 3)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_widen_is_exact_and_linear(dtype):
    x = jnp.asarray([0.0, -0.0, 1 / 3, -1e-6, 3e-39, np.inf, np.nan], dtype)
    assert np.asarray(widen(x)).tobytes() == np.asarray(x).astype(np.float32).tobytes()
    weight = jnp.arange(7.0)
    grads = jax.jit(jax.grad(lambda x: jnp.sum(widen(x) * weight)))(x)
    np.testing.assert_array_equal(grads, weight.astype(dtype))
