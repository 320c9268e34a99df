"""Steps from ranges, and as shorter floats, against numpy, ml_dtypes and exponents in float64."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_compress.numerics.formats import FORMATS
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.steps import (
    float8_steps,
    power_of_two_step,
    step_of,
    step_value,
    zero_dtype,
)

# Steps depend on the ends of a grid only: for most tests a few formats will do.
SOME = ("int16", "int8", "int4", "uint3", "ternary", "binary", "float8_e4m3fn", "float8_e5m2")
SOME += ("float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn", "pot5", "nf4", "odd2")
each_format = pytest.mark.parametrize("name", SOME)
INTEGERS = [n for n, f in FORMATS.items() if isinstance(f.grid, Integers) and not f.absmean]
LENGTH = 8
TINY = np.finfo(np.float32).tiny
MAX = np.finfo(np.float32).max
values = st.floats(allow_nan=False, allow_infinity=False, width=32)
ranges = st.lists(st.tuples(values, values).map(sorted), min_size=LENGTH, max_size=LENGTH).map(
    lambda x: np.array(x, np.float32).T
)
# Nothing, the smallest subnormals, the borders of the normal floats, the largest ones.
EXTREMES = np.float32([0, 2.0**-149, 2.0**-130, TINY / 2, TINY, 1, 2.0**126, 2.0**127, MAX])
PAIRS = np.float32([sorted(p) for p in itertools.product(EXTREMES, -EXTREMES)]).T


def flushed(x):
    """With zeros in the place of subnormals, as XLA computes on CPUs."""
    return np.where(np.abs(x) < TINY, np.float32(0), x)


@each_format
@settings(max_examples=6, deadline=None)
@given(pair=ranges)
def test_symmetric(name, pair):
    low, high = pair
    fmt = FORMATS[name]
    scale, zero = step_of(jnp.asarray(low), jnp.asarray(high), fmt, symmetric=True)
    assert zero is None and scale.dtype == jnp.float32
    want = np.maximum(np.abs(low), np.abs(high)) / np.float32(fmt.top)
    of_nothing = np.float32(1 if fmt.has_zero else TINY)
    np.testing.assert_array_equal(scale, np.where(want >= TINY, want, of_nothing))


@pytest.mark.parametrize("name", ["int16", "int8", "int3", "int1", "uint8", "uint4", "uint1"])
@settings(max_examples=6, deadline=None)
@given(pair=ranges)
def test_asymmetric(name, pair):
    low, high = pair
    grid = FORMATS[name].grid
    scale, zero = step_of(jnp.asarray(low), jnp.asarray(high), FORMATS[name], symmetric=False)
    low, high = flushed(np.minimum(low, 0)), flushed(np.maximum(high, 0))
    want = flushed(flushed(high / 2) - flushed(low / 2)) / np.float32((grid.high - grid.low) / 2)
    want = np.where(want >= TINY, want, np.float32(1))
    np.testing.assert_array_equal(scale, want)
    at = np.clip(grid.low - np.round(low / want), grid.low, grid.high)
    assert zero.dtype == zero_dtype(FORMATS[name])
    np.testing.assert_array_equal(zero, at)


@pytest.mark.parametrize("name", INTEGERS)
def test_zero_points_have_the_dtype_of_bytes(name):
    want = "int16" if name == "int16" else "uint8" if name.startswith("u") else "int8"
    assert zero_dtype(FORMATS[name]) == jnp.dtype(want)


@pytest.mark.parametrize(
    ("name", "symmetric"),
    # One bit on both sides of zero has no positive level, and is refused.
    [(n, True) for n in FORMATS if n != "int1"] + [(n, False) for n in INTEGERS],
)
def test_extreme_ranges_have_finite_steps(name, symmetric):
    low, high = map(jnp.asarray, PAIRS)
    scale, zero = step_of(low, high, FORMATS[name], symmetric)
    assert np.isfinite(scale).all() and (scale >= TINY).all()
    if zero is not None:
        grid = FORMATS[name].grid
        assert ((zero >= grid.low) & (zero <= grid.high)).all()


def binade(x):
    """The exponent of the power of two at or below a positive number."""
    return np.frexp(x.astype(np.float64))[1] - 1


@each_format
@settings(max_examples=6, deadline=None)
@given(pair=ranges)
def test_power_of_two(name, pair):
    fmt = FORMATS[name]
    low, high = pair
    scale = power_of_two_step(jnp.asarray(low), jnp.asarray(high), fmt)
    assert scale.dtype == jnp.float8_e8m0fnu
    absmax = np.maximum(np.abs(low), np.abs(high))
    exponent = binade(absmax) - int(np.floor(np.log2(fmt.top)))
    # The bytes 0 and 255 are a subnormal float32 and NaN.
    want = 2.0 ** np.clip(exponent, -126, 127)
    want = np.where(absmax == 0, 1, np.where(absmax < TINY, 2.0**-126, want))
    got = np.asarray(scale).astype(np.float64)
    # Whether a subnormal is a number or zero is up to the processor.
    normal = (absmax >= TINY) | (absmax == 0)
    np.testing.assert_array_equal(got[normal], want[normal])
    np.testing.assert_array_equal(step_value(scale), got)


@each_format
def test_extreme_ranges_have_finite_powers_of_two(name):
    scale = power_of_two_step(*map(jnp.asarray, PAIRS), FORMATS[name])
    bits = np.asarray(scale).view(np.uint8)
    assert ((bits >= 1) & (bits <= 254)).all()
    assert np.isfinite(step_value(scale)).all() and (step_value(scale) > 0).all()


def test_values_of_all_powers_of_two():
    bits = np.arange(1, 255, dtype=np.uint8)
    scale = bits.view(ml_dtypes.float8_e8m0fnu)
    want = scale.astype(np.float32)
    for value in (step_value, jax.jit(step_value)):
        np.testing.assert_array_equal(value(jnp.asarray(scale)), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_values_of_short_floats(dtype):
    x = jnp.asarray([1.0, 0.15625, 7.5, 448.0], dtype)
    got = step_value(x)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.asarray(x).astype(np.float32))


shares = st.lists(st.floats(-20, 20), min_size=12, max_size=12).map(
    lambda x: np.exp2(np.float32(x)).reshape(2, 3, 2)
)


@settings(max_examples=20, deadline=None)
@given(shares, st.sampled_from([(-1, -2), (-1,), (-3, -2, -1)]))
def test_float8_steps(scale, axes):
    codes, outer = float8_steps(jnp.asarray(scale), axes)
    high = scale.max(axes, keepdims=True)
    assert codes.dtype == jnp.float8_e4m3fn and outer.dtype == jnp.float32
    np.testing.assert_array_equal(outer, high / np.float32(448))
    ratio = np.clip(scale / np.asarray(outer), 0, 448)
    want = ratio.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    got = np.asarray(codes).astype(np.float32)
    np.testing.assert_array_equal(got, np.maximum(want, 2.0**-9))
    np.testing.assert_array_equal(got.max(axes), 448)


@pytest.mark.parametrize("value", [TINY, 2.0**-120, 1, 2.0**100, MAX])
def test_float8_steps_reach_the_largest_one(value):
    """Down to the smallest steps there are, three bits of each step are kept."""
    scale = jnp.full((4, 1), value, jnp.float32)
    codes, outer = float8_steps(scale, (-2, -1))
    got = np.asarray(codes).astype(np.float64) * np.asarray(outer)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, np.float64(value), rtol=2.0**-4)


def test_float8_steps_of_nothing():
    codes, outer = float8_steps(jnp.ones((0, 4)), (-2, -1))
    assert codes.shape == (0, 4) and outer.shape == (1, 1)
    assert np.isfinite(outer).all() and (outer > 0).all()
