"""Products as functions that are transformed, and across numbers of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.products import planar_dot, scaled_dot

K, N = 64, 24
RANGES = {"int8": (-128, 127), "int4": (-8, 7)}
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def pack(codes, bits, block):
    """The planar layout, written from its definition one element at a time along k."""
    *batch, rows, columns = codes.shape
    words = np.zeros((*batch, rows * bits // 8, columns), np.uint8)
    width = block * bits // 8
    for k in range(rows):
        start, within = divmod(k, block)
        plane, i = divmod(within, width)
        field = (codes[..., k, :] & (2**bits - 1)).astype(np.uint8) << (plane * bits)
        words[..., start * width + i, :] |= field
    return words


def inputs(rng, batch, rows, group, dtype, low=-128, high=127, asymmetric=False, columns=N):
    groups = 1 if group is None else K // group
    x = jnp.asarray(rng.normal(size=(*batch, rows, K)), dtype)
    codes = rng.integers(low, high, size=(*batch, K, N), endpoint=True)
    scale = jnp.asarray(rng.uniform(0.5, 2.0, size=(*batch, groups, columns)), jnp.float32)
    zero = None
    if asymmetric:
        zero = jnp.asarray(rng.integers(low, high, size=scale.shape, endpoint=True), jnp.int8)
    return x, codes, scale, zero


def assert_close(y, x, codes, scale, zero):
    """Compares with float64 within the rounding of the weights and of a sum of K products.

    A weight in groups may be rounded once to the type of `x`. A sum of K products, in any order,
    errs by at most K unit roundoffs of float32 relative to the sum of magnitudes; the products with
    the zero points are summed apart, so they count as magnitudes of their own. Scaling, subtracting
    and the second sum add six more.
    """
    x64, codes = np.asarray(x, np.float64), np.asarray(codes, np.float64)
    repeats = K // scale.shape[-2]
    offset = 0.0 if zero is None else np.repeat(np.asarray(zero, np.float64), repeats, axis=-2)
    weight = (codes - offset) * np.repeat(np.asarray(scale, np.float64), repeats, axis=-2)
    sizes = np.abs(codes) + np.abs(offset)
    magnitude = np.abs(x64) @ (sizes * np.repeat(np.asarray(scale, np.float64), repeats, axis=-2))
    rounding = 0.0 if scale.shape[-2] == 1 else ROUNDOFF[x.dtype.name]
    bound = (rounding + (K + 6) * ROUNDOFF["float32"]) * magnitude
    assert y.dtype == jnp.float32
    assert np.all(np.abs(np.asarray(y, np.float64) - x64 @ weight) <= bound)


@pytest.mark.parametrize("packed", [False, True])
def test_transformations(packed):
    x, codes, scale, zero = inputs(np.random.default_rng(4), (3,), 5, 16, "float32", -2, 1, True)
    if packed:
        stored = jnp.asarray(pack(codes, 2, 16))

        def fn(x, stored, scale, zero):
            return planar_dot(x, stored, scale, zero, bits=2, block=16, group=16)
    else:
        stored = jnp.asarray(codes, jnp.int8)

        def fn(x, stored, scale, zero):
            return scaled_dot(x, stored, scale, zero, group=16)

    assert_close(jax.jit(fn)(x, stored, scale, zero), x, codes, scale, zero)
    assert_close(jax.vmap(fn)(x, stored, scale, zero), x, codes, scale, zero)
    shared = jax.vmap(lambda x: fn(x, stored[0], scale[0], zero[0]))(x)
    assert_close(shared, x, codes[:1], scale[:1], zero[:1])
    # The derivative with respect to x is the weight itself, summed over the columns.
    repeated = np.repeat(np.asarray([scale, zero], np.float64), 16, axis=-2)
    weight = (codes - repeated[1]) * repeated[0]
    grads = jax.grad(lambda x: fn(x, stored, scale, zero).sum())(x)
    sizes = ((np.abs(codes) + np.abs(repeated[1])) * repeated[0]).sum(-1)
    bound = (N + 6) * ROUNDOFF["float32"] * sizes[:, None]
    assert np.all(np.abs(grads - weight.sum(-1)[:, None]) <= bound)


def test_preferred_type():
    x, codes, scale, _ = inputs(np.random.default_rng(5), (), 2, None, jnp.bfloat16)
    y = scaled_dot(x, jnp.asarray(codes, jnp.int8), scale, dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16


@pytest.mark.ci
def test_forms_agree_across_row_counts():
    """Few rows, many rows, and rows enough for the dense weight to be the smaller buffer."""
    for rows in (1, 15, 16, 17, 64):
        x, codes, scale, zero = inputs(
            np.random.default_rng(6), (), rows, 16, "bfloat16", -2, 1, True
        )
        dense = jnp.asarray(codes, jnp.int8)
        assert_close(scaled_dot(x, dense, scale, zero, group=16), x, codes, scale, zero)
        words = jnp.asarray(pack(codes, 2, 16))
        y = planar_dot(x, words, scale, zero, bits=2, block=16, group=16)
        assert_close(y, x, codes, scale, zero)
