"""Products of integer codes against int64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_compress.kernels import integer_dots
from jaxopt_compress.kernels.integer_dots import (
    as_stored,
    block_diagonal,
    exact_parts,
    laid_out,
    per_group,
    widened,
)
from jaxopt_compress.kernels.stored import columns_per_byte, packed_columns
from jaxopt_compress.kernels.transposed_dots import transposed_dot
from tests.kernels.products import integer_dot

pytestmark = pytest.mark.ci

K, N, GROUP = 64, 24, 16
DTYPES = ["int8", "uint8", "int4", "uint4"]


@pytest.fixture(params=[False, True], ids=["small", "streamed"])
def streamed(request, monkeypatch):
    """Small weights as they are, and as if they were large."""
    if request.param:
        monkeypatch.setattr(integer_dots, "_SMALL", (0, 0))
        monkeypatch.setattr(integer_dots, "_WHOLE", 0)
        monkeypatch.setattr(integer_dots, "_BLOCK", 32 * N)


def integers(rng, dtype, *shape):
    """All of a type's range, and its ends more often: the largest sums."""
    info = jnp.iinfo(dtype)
    values = rng.integers(info.min, info.max, shape, endpoint=True)
    ends = rng.choice([info.min, info.max], shape)
    values = np.where(rng.random(shape) < 0.5, values, ends)
    return jnp.asarray(values, jnp.int32).astype(dtype), values.astype(np.int64)


def scales(rng, *shape):
    return jnp.asarray(rng.uniform(0.5, 2.0, shape), jnp.float32)


def grouped(x, codes, scale):
    """The scaled sum over groups in float64, and a bound: sums within a group are exact."""
    groups = scale.shape[-2]
    x = x.reshape(*x.shape[:-1], groups, -1).swapaxes(-3, -2)
    partial = x @ codes.reshape(*codes.shape[:-2], groups, -1, codes.shape[-1])
    terms = partial * np.asarray(scale, float)[..., None, :]
    sizes = np.abs(x) @ np.abs(codes).reshape(*codes.shape[:-2], groups, -1, codes.shape[-1])
    sizes = (sizes * np.asarray(scale, float)[..., None, :]).sum(-3)
    return terms.sum(-3), (K + 2) * 2.0**-24 * sizes


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kinds", [*itertools.product(DTYPES, DTYPES)], ids="-".join)
def test_exact(streamed, kinds, rows):
    """Each product of codes, on whatever platform."""
    rng = np.random.default_rng(0)
    x, wide = integers(rng, kinds[0], rows, K)
    codes, wide_codes = integers(rng, kinds[1], K, N)
    for product in (widened, laid_out, integer_dots.streamed):
        y = jax.jit(product)(x, codes)
        assert y.dtype == jnp.int32
        np.testing.assert_array_equal(y, wide @ wide_codes)


def test_exact_beyond_float32():
    """A sum of more than 24 bits, over a depth as large as weights have."""
    x = jnp.full((2, 32768), -128, jnp.int8)
    codes = jnp.full((32768, 3), -128, jnp.int8).at[0].set(-127)
    for rows in (1, 2):
        for product in (as_stored, widened, integer_dots.streamed):
            assert np.all(product(x[:rows], codes) == 32768 * 128**2 - 128)


# Depths that int32 sums, and beyond: with divisors, prime, and for the types of the largest codes.
DEEP = [
    ("int8", "int8", 2**17 - 1),
    ("int8", "int8", 2**17),
    ("int8", "int8", 131101),
    ("int8", "int8", 3 * 2**17),
    ("uint8", "uint8", 33026),
    ("int8", "int4", 2**21),
]


def lowest(kind, *shape):
    """Codes of the largest magnitude, whose products have one sign, with others among them."""
    info = jnp.iinfo(kind)
    values = np.full(shape, info.min or info.max, np.int64)
    values[::7, ::2] += 1 if info.min else -1
    return jnp.asarray(values, jnp.int32).astype(kind), values


@pytest.mark.ci
@pytest.mark.fast(
    "small-1-int8-int8-131071",
    "small-3-int8-int8-131072",
    "small-1-uint8-uint8-33026",
    "streamed-3-int8-int8-131101",
    "streamed-1-int8-int8-393216",
    "streamed-3-int8-int4-2097152",
)
@pytest.mark.parametrize("kind, weight, depth", DEEP)
@pytest.mark.parametrize("rows", [1, 3])
def test_deeper_than_int32_sums(streamed, rows, kind, weight, depth):
    x, wide = lowest(kind, rows, depth)
    codes, wide_codes = lowest(weight, depth, 2)
    one = jnp.ones((1, 1))
    y, want = jax.jit(integer_dot)(x, codes, one), wide @ wide_codes
    assert y.dtype == jnp.float32
    # Four parts at most, of one sign: each sum is rounded once, and the additions are.
    np.testing.assert_allclose(y, want, rtol=5 * 2.0**-24)
    own = jnp.arange(1.0, 1 + rows)[:, None]
    y = integer_dot(x, codes, 2 * one, own)
    np.testing.assert_allclose(y, 2 * want * np.asarray(own), rtol=6 * 2.0**-24)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("depth", [2**17 - 1, 2**17, 131101])
def test_depth_of_a_group(streamed, rows, depth):
    """What counts is the depth of a group."""
    x, wide = lowest("int8", 2, rows, 2 * depth)
    codes, wide_codes = lowest("int8", 2, 2 * depth, 2)
    scale = jnp.asarray([[1.0, 2.0], [0.25, 0.5]] * 2).reshape(2, 2, 2)
    y = jax.jit(functools.partial(integer_dot, group=depth))(x, codes, scale)
    # Each sum is rounded once, and so are the additions.
    np.testing.assert_allclose(y, grouped(wide, wide_codes, scale)[0], rtol=6 * 2.0**-24)


def test_parts():
    """As few as there can be, or a few more that need no padding."""
    int8, int4, uint8 = jnp.int8, jnp.int4, jnp.uint8
    assert exact_parts(2**17 - 1, int8, int8) == exact_parts(1, uint8, uint8) == 1
    assert exact_parts(2**21 - 1, int8, int4) == exact_parts(33025, uint8, uint8) == 1
    assert exact_parts(2**21, int8, int4) == exact_parts(2**17, int8, int8) == 2
    assert exact_parts(2**18, int8, int8) == 4 and exact_parts(131101, int8, int8) == 2


def test_ordinary_depths_are_one_product():
    def program(depth):
        x, codes = jnp.ones((2, depth), jnp.int8), jnp.ones((depth, 2), jnp.int8)
        calls = (integer_dot, (x, codes, jnp.ones((1, 1)))), (transposed_dot, (x, codes))
        text = "".join(str(jax.make_jaxpr(fn)(*args)) for fn, args in calls)
        text = text.replace(str(depth + 1), "K + 1").replace(str(depth), "K")
        return "".join(text.split())

    assert program(2**17 - 1) == program(1009)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("depth", [2**17, 131101])
def test_transposed_deeper_than_int32_sums(depth, last):
    a, wide = lowest("int8", depth, 3)
    b, wide_b = lowest("int8", *((2, depth) if last else (depth, 2)))
    y = jax.jit(functools.partial(transposed_dot, last=last))(a.T, b)
    want = wide.T @ (wide_b.T if last else wide_b)
    np.testing.assert_allclose(y, want, rtol=5 * 2.0**-24)


@pytest.mark.parametrize("columns", [1, N])
def test_one_scale_per_column_or_in_all(columns):
    rng = np.random.default_rng(2)
    x, wide = integers(rng, "int8", 3, K)
    codes, wide_codes = integers(rng, "int8", K, N)
    scale = scales(rng, 1, columns)
    y = integer_dot(x, codes, scale)
    np.testing.assert_array_equal(y, (wide @ wide_codes).astype(np.float32) * np.asarray(scale))
    np.testing.assert_array_equal(
        integer_dot(x, codes, scale, scale[:, :1] * 2), y * scale[0, 0] * 2
    )


@pytest.mark.slow
@pytest.mark.parametrize("columns", [1, N])
@pytest.mark.parametrize("rows", [1, 5])
def test_one_scale_per_group_or_column_of_it(streamed, rows, columns):
    rng = np.random.default_rng(3)
    x, wide = integers(rng, "int8", rows, K)
    codes, wide_codes = integers(rng, "int4", K, N)
    scale = scales(rng, K // GROUP, columns)
    expected, bound = grouped(wide, wide_codes, scale)
    assert np.all(np.abs(integer_dot(x, codes, scale, group=GROUP) - expected) <= bound)
    own = scales(rng, rows, 1)
    # Up to twice as large, and a product more is rounded.
    y = integer_dot(x, codes, scale, own, group=GROUP)
    assert np.all(np.abs(y - expected * np.asarray(own, float)) <= 2.1 * bound)


@pytest.mark.parametrize("form", [integer_dot, per_group, block_diagonal])
def test_scales_of_bfloat16_beside_float32_ones(form):
    """As if they were float32: products with powers of two are exact."""
    rng = np.random.default_rng(6)
    x, _ = integers(rng, "int8", 7, K)
    codes, _ = integers(rng, "int4", K, N)
    short = scales(rng, K // GROUP, N).astype(jnp.bfloat16)
    own = jnp.asarray([-1.0, 3.14159e-12, 2.0**-100, -1e20, 0, np.nan, np.inf])[:, None]
    form = functools.partial(form, group=GROUP) if form is integer_dot else form
    y, want = jax.jit(form)(x, codes, short, own), form(x, codes, short.astype(jnp.float32), own)
    assert y.dtype == jnp.float32 and np.all(np.isnan(y[5])) and not np.any(np.isfinite(y[6]))
    # Sums of the same numbers, twice rounded each, in either order.
    y, want = np.asarray(y[:5]), np.asarray(want[:5])
    sums = np.abs(want).max(-1, keepdims=True)
    assert np.all(np.abs(y - want) <= (K // GROUP + 4) * 2.0**-24 * sums)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 5])
def test_transformations(streamed, rows):
    rng = np.random.default_rng(5)
    x, wide = integers(rng, "int8", 3, rows, K)
    codes, wide_codes = integers(rng, "int8", K, N)
    stacked = jnp.stack([codes] * 3)
    for product in (integer_dots.streamed, laid_out):
        np.testing.assert_array_equal(jax.vmap(product, (0, None))(x, codes), wide @ wide_codes)
        np.testing.assert_array_equal(jax.jit(jax.vmap(product))(x, stacked), wide @ wide_codes)
    scale = scales(rng, K // GROUP, N)
    fn = functools.partial(integer_dot, group=GROUP)
    expected, bound = grouped(wide[0], wide_codes, scale)
    y = jax.vmap(fn, (0, None, None))(x, codes, scale)
    assert np.all(np.abs(y[0] - expected) <= bound)
    # The derivative with respect to a scale is the sum of its group, an integer.
    grads = jax.grad(lambda scale: fn(x[0], codes, scale).sum())(scale)
    sums = np.einsum(
        "mgk,gkn->gn", wide[0].reshape(rows, -1, GROUP), wide_codes.reshape(-1, GROUP, N)
    )
    np.testing.assert_array_equal(grads, sums)


@pytest.mark.parametrize("kind, name", [("int8", "i8"), ("int4", "i4")])
@pytest.mark.parametrize("group", [None, GROUP])
def test_what_is_lowered_for_a_tpu(kind, name, group):
    """Products of the codes as they are stored."""
    x, codes = jnp.ones((32, K), jnp.int8), jnp.ones((K, N), kind)
    scale = jnp.ones((1 if group is None else K // group, N))
    traced = jax.jit(functools.partial(integer_dot, group=group)).trace(x, codes, scale)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    (dot,) = [line for line in text.splitlines() if "dot_general" in line]
    operands = dot.rsplit(" : ", 1)[1]
    assert (
        "xi8>, tensor<" in operands and f"x{name}>) -> " in operands and operands.endswith("i32>")
    )


def test_packed_columns_hold_the_codes():
    for dtype in ("int2", "uint2", "int4", "uint4"):
        info = jnp.iinfo(dtype)
        values = np.arange(info.min, info.max + 1).reshape(1, -1)
        codes = jnp.asarray(values, jnp.int32).astype(dtype)
        several = columns_per_byte(codes)
        words = np.asarray(packed_columns(codes))
        bits = 8 // several
        fields = [(words >> (i * bits)) & (2**bits - 1) for i in range(several)]
        np.testing.assert_array_equal(np.stack(fields, -1).reshape(1, -1), values & (2**bits - 1))
