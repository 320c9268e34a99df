"""Contractions in compressed form against a float64 reference."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxopt_compress.kernels import planar_dot, scaled_dot
from jaxopt_compress.kernels.dots import block_diagonal, dequantized, per_group

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


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("codes_dtype", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scaled_dot_integers(dtype, codes_dtype, group, asymmetric):
    low, high = RANGES[codes_dtype]
    x, codes, scale, zero = inputs(
        np.random.default_rng(0), (), 5, group, dtype, low, high, asymmetric
    )
    y = scaled_dot(x, jnp.asarray(codes, codes_dtype), scale, zero, group=group)
    assert_close(y, x, codes, scale, zero)


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("codes_dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_scaled_dot_float8(codes_dtype, group):
    x, codes, scale, _ = inputs(np.random.default_rng(1), (), 5, group, jnp.bfloat16)
    codes = jnp.asarray(codes / 16, codes_dtype)
    assert_close(scaled_dot(x, codes, scale, group=group), x, codes, scale, None)


@pytest.mark.fast(
    "1-64-None-True",
    "1-8-32-False",
    "2-16-16-True",
    "2-64-None-False",
    "4-16-None-True",
    "4-8-32-True",
)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("block, group", [(64, None), (16, None), (16, 16), (8, 32)])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_planar_dot(bits, block, group, asymmetric):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x, codes, scale, zero = inputs(
        np.random.default_rng(2), (), 5, group, jnp.bfloat16, low, high, asymmetric
    )
    words = jnp.asarray(pack(codes, bits, block))
    y = planar_dot(x, words, scale, zero, bits=bits, block=block, group=group)
    assert_close(y, x, codes, scale, zero)


@pytest.mark.fast(
    "None-batch0-33-24",
    "None-batch1-1-1",
    "None-batch2-33-1",
    "16-batch0-1-24",
    "16-batch1-33-24",
    "16-batch2-1-1",
)
@pytest.mark.parametrize("columns", [1, N])
@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("group", [None, 16])
def test_batches_and_columns(group, batch, rows, columns):
    x, codes, scale, zero = inputs(
        np.random.default_rng(3), batch, rows, group, "float32", -2, 1, True, columns
    )
    dense = jnp.asarray(codes, jnp.int8)
    assert_close(scaled_dot(x, dense, scale, zero, group=group), x, codes, scale, zero)
    y = planar_dot(x, jnp.asarray(pack(codes, 2, 16)), scale, zero, bits=2, block=16, group=group)
    assert_close(y, x, codes, scale, zero)


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
    y = scaled_dot(x, jnp.asarray(codes, jnp.int8), scale, preferred=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16


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


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("columns", [1, N])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", [block_diagonal, per_group, dequantized])
def test_forms_of_each_platform(form, dtype, columns, batch, rows):
    """`scaled_dot` chooses by platform; here every form runs on this one."""
    x, codes, scale, _ = inputs(
        np.random.default_rng(7), batch, rows, 16, dtype, -8, 7, columns=columns
    )
    assert_close(form(x, jnp.asarray(codes, jnp.int4), scale), x, codes, scale, None)


@pytest.mark.parametrize(
    "shapes, options, message",
    [
        ([(2, 8), (6, 4), (1, 4)], {}, "does not meet"),
        ([(2, 8), (8, 4), (2, 4)], {}, "group = None"),
        ([(2, 8), (8, 4), (2, 4)], {"group": 2}, "group = 2"),
        ([(2, 8), (8, 4), (1, 3)], {}, "does not fit a weight"),
        ([(2, 8), (8, 4), (1, 4), (1, 1)], {}, "shape of scale"),
        ([(3, 2, 8), (8, 4), (1, 4)], {}, "does not meet"),
        ([(2, 8), (2, 4), (1, 4)], {"bits": 2, "block": 6}, "multiple of 4"),
        ([(2, 8), (2, 4), (1, 4)], {"bits": 2, "block": 16}, "divides the 8"),
        ([(2, 8), (2, 4), (1, 4)], {"bits": 3, "block": 8}, "1, 2 or 4"),
    ],
)
def test_errors(shapes, options, message):
    dtypes = (jnp.float32, jnp.uint8 if "bits" in options else jnp.int8, jnp.float32, jnp.int8)
    arrays = [jnp.ones(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    with pytest.raises(ValueError, match=message):
        (planar_dot if "bits" in options else scaled_dot)(*arrays, **options)
