"""Hadamard transforms against scipy's matrices, and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_compress.numerics.hadamard import hadamard, hadamard_exists, rotated, transform_sizes


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_powers_of_two_are_scipys(n):
    np.testing.assert_array_equal(hadamard(n), scipy.linalg.hadamard(n))


@pytest.mark.parametrize("n", [n for n in range(4, 201, 4) if hadamard_exists(n)])
def test_rows_are_orthogonal(n):
    h = hadamard(n).astype(int)
    np.testing.assert_array_equal(np.abs(h), 1)
    np.testing.assert_array_equal(h @ h.T, n * np.eye(n))


@given(st.integers(1, 5000))
def test_sizes_divide(n):
    sizes = transform_sizes(n)
    whole = int(np.prod(sizes, initial=1))
    assert n % whole == 0 and all(map(hadamard_exists, sizes))
    # Blocks are as large as powers of two allow.
    assert (n // whole) % 2 == 1


@pytest.mark.parametrize("n", [8, 96, 6])
def test_is_the_product_with_a_matrix_and_its_transpose(n):
    rng = np.random.default_rng(0)
    x, signs = rng.normal(size=(3, n, 2)), rng.choice([-1, 1], (1, n, 1))
    matrix = np.ones((1, 1))
    for size in transform_sizes(n):
        matrix = np.kron(matrix, hadamard(size) / size**0.5)
    matrix = np.kron(np.eye(n // len(matrix)), matrix)
    got = rotated(jnp.asarray(x, jnp.float32), jnp.asarray(signs, jnp.int8), [1])
    # Sums of n float32 numbers of size 1.
    np.testing.assert_allclose(got, np.einsum("akc,kl->alc", x * signs, matrix), atol=1e-5)
    for in_order in (False, True):
        back = rotated(got, jnp.asarray(signs, jnp.int8), [-2], inverse=True, in_order=in_order)
        np.testing.assert_allclose(back, x, atol=1e-5)


def test_outliers_are_spread():
    x = jax.random.normal(jax.random.key(0), (64, 512)).at[:, 7].mul(100.0)
    signs = jax.random.rademacher(jax.random.key(1), (1, 512), jnp.int8)
    peak = lambda x: float(jnp.mean(jnp.max(jnp.abs(x), -1) / jnp.sqrt(jnp.mean(x**2, -1))))
    # A row with one entry of the norm has sqrt(512) = 22.6; all entries alike would have 1.
    assert peak(x) > 15 and peak(rotated(x, signs, [-1])) < 4
