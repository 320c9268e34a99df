"""Rounding to codes and back against numpy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_compress.numerics.formats import FORMATS, absmax_scale, decode, encode, format_of
from jaxopt_compress.numerics.rounding import seal

each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
LENGTH = 12
TINY = float(np.finfo(np.float32).tiny)
# Up to magnitudes whose steps still have a normal reciprocal.
floats = st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False)
vectors = st.lists(
    st.one_of(floats, st.floats(-4, 4, width=32, allow_subnormal=False), st.just(-0.0)),
    min_size=LENGTH,
    max_size=LENGTH,
).map(lambda x: np.array(x, np.float32).reshape(2, -1))


@pytest.mark.parametrize(
    "name, bits, qmin, qmax, packed",
    [("int8", 8, -128, 127, False), ("int4", 4, -8, 7, False), ("int2", 2, -2, 1, True)],
)
def test_format_of(name, bits, qmin, qmax, packed):
    fmt = format_of(name)
    assert (fmt.bits, fmt.qmin, fmt.qmax, fmt.packed) == (bits, qmin, qmax, packed)
    assert format_of(fmt) is fmt


def test_unknown_format():
    with pytest.raises(
        ValueError, match="unknown number format 'int5'; there are int8, int4, int2"
    ):
        format_of("int5")


@each_format
@settings(max_examples=40, deadline=None)
@given(x=vectors)
def test_symmetric(fmt, x):
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    scale, zero = absmax_scale(jnp.asarray(low), jnp.asarray(high), fmt, symmetric=True)
    want = np.abs(x).max(1, keepdims=True) / np.float32(fmt.qmax + 0.5)
    assert zero is None and scale.dtype == jnp.float32
    np.testing.assert_array_equal(scale, np.where(want >= TINY, want, np.float32(1)))
    codes, inside = encode(jnp.asarray(x), scale, None, fmt)
    level = np.round(x * (np.float32(1) / np.asarray(scale)))
    np.testing.assert_array_equal(codes, np.clip(level, fmt.qmin, fmt.qmax))
    np.testing.assert_array_equal(inside, (level >= fmt.qmin) & (level <= fmt.qmax))
    # Half a step everywhere: the largest magnitude lies half a step beyond the highest code.
    back = np.asarray(decode(codes.astype(jnp.int32), scale, jnp.float32), np.float64)
    step = np.asarray(scale, np.float64)
    assert (np.abs(back - x) <= step * (0.5 + fmt.qmax * 2.0**-21)).all()
    again, _ = encode(jnp.asarray(back, jnp.float32), scale, None, fmt)
    np.testing.assert_array_equal(again, codes)


@each_format
@settings(max_examples=40, deadline=None)
@given(x=vectors)
def test_asymmetric(fmt, x):
    low, high = jnp.asarray(x.min(1, keepdims=True)), jnp.asarray(x.max(1, keepdims=True))
    scale, zero = absmax_scale(low, high, fmt, symmetric=False)
    assert scale.dtype == jnp.float32 and zero.dtype == jnp.int8
    assert ((zero >= fmt.qmin) & (zero <= fmt.qmax)).all()
    codes, inside = encode(jnp.asarray(x), scale, zero, fmt)
    level = np.round(x * (np.float32(1) / np.asarray(scale))) + np.asarray(zero, np.float32)
    np.testing.assert_array_equal(codes, np.clip(level, fmt.qmin, fmt.qmax))
    np.testing.assert_array_equal(inside, np.asarray(codes) == level)
    levels = codes.astype(jnp.int32) - zero.astype(jnp.int32)
    back = np.asarray(decode(levels, scale, jnp.float32))
    # Zero has a code of its own, and no entry is off by more than the two roundings of its ends.
    assert (back[x == 0] == 0).all()
    step = np.asarray(scale, np.float64)
    top = np.float64(np.finfo(np.float32).max)
    ends = np.abs(np.asarray(levels) * step)
    assert (np.abs(back - x.astype(np.float64)) <= step * 1.01)[ends <= top].all()


@each_format
@pytest.mark.parametrize("symmetric", [True, False])
def test_same_bits_eagerly_compiled_and_with_known_scales(fmt, symmetric):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 512)), jnp.float32)
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    scale, zero = absmax_scale(low, high, fmt, symmetric)
    jitted = jax.jit(lambda a, b: absmax_scale(a, b, fmt, symmetric))(low, high)
    known = jax.jit(lambda: absmax_scale(low, high, fmt, symmetric))()
    for got in (jitted, known):
        np.testing.assert_array_equal(got[0], scale)
        if zero is not None:
            np.testing.assert_array_equal(got[1], zero)
    # Entries on ties, where a scale's reciprocal would decide otherwise.
    levels = np.arange(512) % (2 * fmt.qmax + 1) - fmt.qmax - 0.5
    ties = jnp.asarray(levels, jnp.float32) * scale
    codes, inside = encode(ties, scale, zero, fmt)
    wide = jnp.broadcast_to(scale, ties.shape)
    for got in (
        jax.jit(lambda x, s: encode(x, s, zero, fmt))(ties, scale),
        jax.jit(lambda x: encode(x, scale, zero, fmt))(ties),
        encode(ties, wide, zero, fmt),
        jax.jit(lambda x, s: encode(x, jnp.broadcast_to(s, x.shape), zero, fmt))(ties, scale),
        jax.jit(lambda x: encode(x, wide, zero, fmt))(ties),
    ):
        np.testing.assert_array_equal(got[0], codes)
        np.testing.assert_array_equal(got[1], inside)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@settings(max_examples=40, deadline=None)
@given(x=vectors, code=st.integers(-383, 383))
def test_decode_stays_finite(dtype, x, code):
    got = np.asarray(decode(jnp.full(x.shape, code), jnp.abs(jnp.asarray(x)), dtype))
    assert np.isfinite(got.astype(np.float32)).all()
    top = np.float32(jnp.finfo(dtype).max)
    with np.errstate(over="ignore"):
        want = np.clip(np.float32(code) * np.abs(x), -top, top)
    np.testing.assert_array_equal(got, want.astype(got.dtype))


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
def test_seal_has_the_derivative_of_a_conversion(dtype):
    x, weight = jnp.asarray([1.5, 1e-6, -3e-5]), jnp.asarray([1.0, 2.0, 3.0])
    loss = lambda x: jnp.sum(seal(x, dtype).astype(jnp.float32) * weight)
    np.testing.assert_array_equal(jax.grad(loss)(x), weight)
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(loss)))(x[None]), weight[None])
    assert jax.jvp(loss, (x,), (jnp.ones(3),))[1] == 6
    np.testing.assert_array_equal(jax.hessian(loss)(x), np.zeros((3, 3)))
