"""Rounding to levels, codes and back, against numpy and ml_dtypes."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_compress.numerics.codebooks import Codebook
from jaxopt_compress.numerics.codes import decode, encode, levels_of, round_to_grid
from jaxopt_compress.numerics.formats import FORMATS, format_of
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.steps import step_of

# Integers differ by their ends only.
SYMMETRIC = ("int16", "int8", "int4", "int2", "uint8", "uint5", "uint1")
ASYMMETRIC = ("int16", "int8", "int3", "int1", "uint8", "uint4", "uint1")
FLOATS = ("float8_e4m3fn", "float8_e5m2", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn")
OTHERS = (*FLOATS, "pot5", "pot3", "ternary", "binary", "nf4", "odd3")
LENGTH = 16
# Up to magnitudes whose steps still have a normal reciprocal.
floats = st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False)
vectors = st.lists(
    st.one_of(floats, st.floats(-4, 4, width=32, allow_subnormal=False), st.just(-0.0)),
    min_size=LENGTH,
    max_size=LENGTH,
).map(lambda x: np.array(x, np.float32).reshape(2, -1))


@functools.cache
def program(name, asymmetric=False):
    """Codes, whether entries are inside, and levels again; the zero point still in both."""
    fmt = FORMATS[name]

    @jax.jit
    def run(x, scale, zero):
        levels, inside = round_to_grid(x, scale, zero if asymmetric else None, fmt)
        codes = encode(levels, fmt)
        return codes, inside, levels, levels_of(codes, fmt)

    return run


def ratios(x, scale):
    """What is rounded: both factors in float32, subnormals being zeros on CPUs."""
    ratio = x * (np.float32(1) / np.asarray(scale))
    return np.where(np.abs(ratio) < np.finfo(np.float32).tiny, np.float32(0), ratio)


def nearest(ratio, fmt):
    """The level of each ratio: ml_dtypes for floats that it has, else a search."""
    grid = fmt.grid
    if isinstance(grid, Codebook):
        at = np.float32(grid.levels)
        middle = np.float32((at[1:].astype(float) + at[:-1]) / 2)
        return at[np.searchsorted(middle, ratio, "left")]
    clipped = np.clip(ratio, grid.low, grid.high)
    if isinstance(grid, Integers):
        return np.round(clipped)
    if grid.mantissa_bits:
        return clipped.astype(getattr(ml_dtypes, fmt.name)).astype(np.float32)
    magnitudes = np.append(0, 2.0 ** np.arange(np.log2(grid.least), np.log2(grid.high) + 1))
    middle = (magnitudes[1:] + magnitudes[:-1]) / 2
    # Of two powers as near the larger one, except that zero is preferred to the smallest.
    place = np.searchsorted(middle, np.abs(clipped), "right")
    place = np.where(np.abs(clipped) == middle[0], 0, place)
    return np.copysign(magnitudes[place], clipped).astype(np.float32)


@pytest.mark.parametrize("name", SYMMETRIC)
@settings(max_examples=20, deadline=None)
@given(x=vectors)
def test_symmetric_integers(name, x):
    fmt = FORMATS[name]
    x = x if fmt.grid.signed else np.abs(x)
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    scale, zero = step_of(jnp.asarray(low), jnp.asarray(high), fmt, symmetric=True)
    assert zero is None
    codes, inside, levels, back = program(name)(x, scale, 0)
    level = np.round(ratios(x, scale))
    low, high = fmt.grid.low, fmt.grid.high
    assert codes.dtype == fmt.dtype
    np.testing.assert_array_equal(codes.astype(jnp.int32), np.clip(level, low, high))
    np.testing.assert_array_equal(inside, (level >= low) & (level <= high))
    np.testing.assert_array_equal(back, levels)
    # Half a step everywhere: the largest magnitude lies half a step beyond the highest code.
    step = np.asarray(scale, np.float64)
    slack = step * (0.5 + high * 2.0**-21)
    assert (np.abs(np.asarray(back) * step - x) <= slack).all()


@pytest.mark.parametrize("name", ASYMMETRIC)
@settings(max_examples=20, deadline=None)
@given(x=vectors)
def test_asymmetric_integers(name, x):
    fmt = FORMATS[name]
    low, high = jnp.asarray(x.min(1, keepdims=True)), jnp.asarray(x.max(1, keepdims=True))
    scale, zero = step_of(low, high, fmt, symmetric=False)
    codes, inside, levels, back = program(name, True)(x, scale, zero)
    level = np.round(ratios(x, scale)) + np.asarray(zero, np.float32)
    want = np.clip(level, fmt.grid.low, fmt.grid.high)
    np.testing.assert_array_equal(codes.astype(jnp.int32), want)
    np.testing.assert_array_equal(inside, want == level)
    np.testing.assert_array_equal(back, levels)
    # Zero has a code of its own, and no entry is off by more than the two roundings of its ends.
    code = np.asarray(codes.astype(jnp.int32)) - np.asarray(zero, np.int32)
    assert (code[x == 0] == 0).all()
    step = np.asarray(scale, np.float64)
    assert (np.abs(code * step - x) <= step * (1 + fmt.grid.high * 2.0**-21)).all()


@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=20, deadline=None)
@given(x=vectors, part=st.sampled_from([0.5, 1.0, 1.25]))
def test_other_grids(name, x, part):
    """Any step: one that leaves values out, the one of the range, and a larger one."""
    fmt = FORMATS[name]
    high = jnp.asarray(np.abs(x).max(1, keepdims=True) * np.float32(part))
    scale, _ = step_of(-high, high, fmt, symmetric=True)
    codes, inside, levels, back = program(name)(x, scale, 0)
    ratio = ratios(x, scale)
    # Whether the smallest ratios are numbers or zeros is up to the processor.
    clear = (x == 0) | (np.abs(ratio) >= 2 * np.finfo(np.float32).tiny)
    np.testing.assert_array_equal(np.asarray(levels)[clear], nearest(ratio, fmt)[clear])
    np.testing.assert_array_equal(back, levels)
    assert codes.dtype == fmt.dtype
    far = np.abs(ratio) > (1.5 if name == "ternary" else 1.0001 * fmt.grid.high)
    assert not np.any(np.asarray(inside)[far])
    assert np.asarray(inside)[np.abs(ratio) <= fmt.grid.high].all()


@pytest.mark.parametrize("name", [n for n in OTHERS if FORMATS[n].has_zero])
def test_equal_levels_have_equal_codes(name):
    """Zeros of either sign, and what rounds to them, have one code."""
    x = jnp.asarray([0.0, -0.0, 1e-30, -1e-30, 1, -1, 0, 0] * 2, jnp.float32).reshape(2, 8)
    codes = np.asarray(program(name)(x, jnp.ones((2, 1)), 0)[0]).view(np.uint8)
    assert len(np.unique(codes[:, :4])) == 1


@pytest.mark.parametrize(
    ("name", "symmetric"),
    [("uint5", False), ("float6_e2m3fn", True)],
)
def test_same_bits_eagerly_compiled_and_with_known_scales(name, symmetric):
    fmt = FORMATS[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 512)), jnp.float32)
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    scale, zero = step_of(low, high, fmt, symmetric)
    jitted = jax.jit(lambda a, b: step_of(a, b, fmt, symmetric))(low, high)
    known = jax.jit(lambda: step_of(low, high, fmt, symmetric))()
    for got in (jitted, known):
        np.testing.assert_array_equal(got[0], scale)
        if zero is not None:
            np.testing.assert_array_equal(got[1], zero)
    # Entries on ties, where a scale's reciprocal would decide otherwise.
    at = np.unique(np.asarray(levels_of(jnp.arange(2**fmt.bits).astype(fmt.dtype), fmt)))
    ties = jnp.asarray(np.resize((at[1:] + at[:-1]) / 2, 512)) * scale

    def run(x, scale):
        levels, inside = round_to_grid(x, scale, zero, fmt)
        return encode(levels, fmt), inside

    codes, inside = run(ties, scale)
    wide = jnp.broadcast_to(scale, ties.shape)
    for got in (
        jax.jit(run)(ties, scale),
        jax.jit(lambda x: run(x, scale))(ties),
        run(ties, wide),
        jax.jit(lambda x, s: run(x, jnp.broadcast_to(s, x.shape)))(ties, scale),
        jax.jit(lambda x: run(x, wide))(ties),
    ):
        np.testing.assert_array_equal(np.asarray(got[0]), np.asarray(codes))
        np.testing.assert_array_equal(got[1], inside)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@settings(max_examples=30, deadline=None)
@given(x=vectors, level=st.integers(-383, 383))
def test_decode_stays_finite(dtype, x, level):
    got = np.asarray(decode(jnp.full(x.shape, level), jnp.abs(jnp.asarray(x)), dtype))
    assert np.isfinite(got.astype(np.float32)).all()
    top = np.float32(jnp.finfo(dtype).max)
    with np.errstate(over="ignore"):
        want = np.clip(np.float32(level) * np.abs(x), -top, top)
    np.testing.assert_array_equal(got, want.astype(got.dtype))


@pytest.mark.parametrize("name", ["int16", "int8", "uint4", "int2", "ternary"])
def test_stochastic_rounding_of_integers(name):
    grid = format_of(name).grid
    rng = np.random.default_rng(0)
    x = np.float32(rng.uniform(grid.low, grid.high, 64))
    trials = 512
    noise = np.float32((np.arange(trials) + 0.5) / trials)
    got = np.asarray(jax.jit(grid.round)(np.tile(x, (trials, 1)), np.tile(noise, (64, 1)).T))
    assert ((got == np.floor(x)) | (got == np.ceil(x))).all()
    # Of evenly spaced noise as much lies below a part as the part says, up to one in `trials`.
    assert (np.abs(got.astype(float).mean(0) - x) <= 1.01 / trials).all()


@pytest.mark.parametrize("noise", [0.0, 1 - 2.0**-23], ids=["least", "most"])
@pytest.mark.parametrize("name", ["int16", "int8", "uint4", "int2", "ternary"])
def test_stochastic_rounding_keeps_integers(name, noise):
    grid = format_of(name).grid
    at = np.arange(grid.low, grid.high + 1, dtype=np.float32)
    got = grid.round(jnp.asarray(at), jnp.full(at.shape, noise, jnp.float32))
    np.testing.assert_array_equal(got, at)
