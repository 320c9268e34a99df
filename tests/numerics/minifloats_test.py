"""Small floats against ml_dtypes, and powers of two against the nearest of all levels."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_compress.numerics.formats import FORMATS

SMALL = ("float8_e4m3fn", "float8_e5m2", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn")
POWERS = ("pot3", "pot4", "pot5")
each = pytest.mark.parametrize("name", SMALL)
# All arrays are filled up to one length, so that one program serves all formats.
LENGTH = 2048
# The largest below 1 that `jax.random.uniform` draws.
MOST = np.float32(1 - 2.0**-23)


def patterns(name):
    """Every bit pattern, and its value by ml_dtypes."""
    codes = np.resize(np.arange(2 ** FORMATS[name].bits, dtype=np.uint8), LENGTH)
    return codes, codes.view(getattr(ml_dtypes, name)).astype(np.float32)


def levels(name):
    """The finite values of a format, ascending."""
    grid = FORMATS[name].grid
    codes = np.resize(np.arange(2 ** FORMATS[name].bits, dtype=np.uint8), LENGTH)
    values = np.asarray(grid.decode(jnp.asarray(codes)))
    return np.unique(values[np.isfinite(values) & (np.abs(values) <= grid.high)])


def between(name):
    """Levels, the middles of neighbours, and the floats next to both, of either sign."""
    at = levels(name)
    middle = (at[1:] + at[:-1]) / 2
    points = np.concatenate([at, middle])
    sides = [np.nextafter(points, np.float32(s) * np.inf) for s in (-1, 1)]
    x = np.concatenate([points, *sides]).astype(np.float32)
    # JAX on CPU takes float32 subnormals for zeros, as they are here after rounding.
    return np.resize(x[np.abs(x) <= FORMATS[name].grid.high], LENGTH)


@functools.cache
def rounding(name):
    return jax.jit(FORMATS[name].grid.round)


@each
def test_values_of_all_patterns(name):
    codes, want = patterns(name)
    got = np.asarray(FORMATS[name].grid.decode(jnp.asarray(codes)))
    finite = np.isfinite(want)
    assert got[finite].tobytes() == want[finite].tobytes()
    unused = {"float8_e4m3fn": 2, "float8_e5m2": 8}.get(name, 0)
    assert len(np.unique(codes[finite])) == 2 ** FORMATS[name].bits - unused


@each
def test_patterns_of_all_values(name):
    codes, values = patterns(name)
    known = np.isfinite(values) & ~((values == 0) & np.signbit(values))
    got = np.asarray(FORMATS[name].grid.encode(jnp.asarray(values)))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got[known], codes[known])


@each
def test_negative_zero_has_the_code_of_zero(name):
    assert not np.any(FORMATS[name].grid.encode(jnp.full(LENGTH, -0.0)))


@each
def test_rounding_around_every_level_and_tie(name):
    x = between(name)
    want = x.astype(getattr(ml_dtypes, name)).astype(np.float32)
    for round_ in (FORMATS[name].grid.round, rounding(name)):
        np.testing.assert_array_equal(round_(jnp.asarray(x)), want)
    codes = FORMATS[name].grid.encode(jnp.asarray(want))
    zero = want == 0
    bits = x.astype(getattr(ml_dtypes, name)).view(np.uint8)
    np.testing.assert_array_equal(codes, np.where(zero, 0, bits))


@each
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_rounding_of_any_value(name, data):
    high = FORMATS[name].grid.high
    inside = st.floats(-high, high, width=32, allow_subnormal=False)
    near = st.floats(-64 * FORMATS[name].grid.least, 64 * FORMATS[name].grid.least, width=32)
    x = np.resize(data.draw(st.lists(inside | near, min_size=16, max_size=16)), LENGTH)
    x = x.astype(np.float32)
    want = x.astype(getattr(ml_dtypes, name)).astype(np.float32)
    np.testing.assert_array_equal(rounding(name)(x), want)


@pytest.mark.parametrize("name", SMALL + POWERS)
def test_saturation(name):
    """Beyond the largest value there is the largest, where ml_dtypes has NaN or infinity."""
    high = np.float32(FORMATS[name].grid.high)
    beyond = [np.nextafter(high, np.inf), 1.03 * high, 1.04 * high, 1.5 * high, 1e30, 3.4028235e38]
    x = np.resize(np.float32([s * v for v in beyond for s in (1, -1)]), LENGTH)
    for round_ in (FORMATS[name].grid.round, rounding(name)):
        np.testing.assert_array_equal(round_(jnp.asarray(x)), np.sign(x) * high)


@pytest.mark.parametrize("name", POWERS)
def test_powers_of_two(name):
    grid, bits = FORMATS[name].grid, FORMATS[name].bits
    powers = 2.0 ** np.arange(2 ** (bits - 1) - 1)
    # The middle of the exponents is 1: with b bits they are 2^(b-1) - 1 in a row.
    powers = powers / powers[2 ** (bits - 2) - 2]
    np.testing.assert_array_equal(levels(name), [*-powers[::-1], 0, *powers])
    assert (grid.least, grid.high) == (powers[0], powers[-1])
    at = np.resize(levels(name), LENGTH)
    np.testing.assert_array_equal(grid.decode(grid.encode(jnp.asarray(at))), at)
    x = between(name)
    distance = np.abs(np.float64(x)[:, None] - levels(name))
    got = np.asarray(rounding(name)(x))
    np.testing.assert_array_equal(np.abs(got - x.astype(float)), distance.min(1))
    # Of two equally near powers the larger one; zero where the smallest is as near.
    ties = np.append(0.5 * powers[0], 1.5 * powers[:-1]).astype(np.float32)
    want = np.append(0, powers[1:])
    ties, want = (np.resize(np.append(v, -v), LENGTH) for v in (ties, want))
    np.testing.assert_array_equal(rounding(name)(ties), want)


@pytest.mark.parametrize("name", SMALL + POWERS)
def test_stochastic_rounding(name):
    grid, at = FORMATS[name].grid, levels(name)
    rng = np.random.default_rng(0)
    low = rng.integers(len(at) - 1, size=64)
    gap = at[low + 1].astype(float) - at[low]
    x = np.float32(at[low] + rng.random(64) * gap)
    trials = 512
    noise = np.float32((np.arange(trials) + 0.5) / trials)
    got = np.asarray(jax.jit(grid.round)(np.tile(x, (trials, 1)), np.tile(noise, (64, 1)).T))
    assert ((got == at[low]) | (got == at[low + 1]) | (got == x)).all()
    # Of evenly spaced noise as much lies below a part as the part says, up to one in `trials`.
    assert (np.abs(got.astype(float).mean(0) - x) <= gap / trials * 1.01).all()


@pytest.mark.parametrize("noise", [np.float32(0), MOST], ids=["least", "most"])
@pytest.mark.parametrize("name", SMALL + POWERS)
def test_stochastic_rounding_keeps_levels(name, noise):
    at = np.resize(levels(name), LENGTH)
    got = FORMATS[name].grid.round(jnp.asarray(at), jnp.full(LENGTH, noise))
    np.testing.assert_array_equal(got, at)
