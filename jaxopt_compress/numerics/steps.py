"""The step between levels: from a range, in float32 or as a shorter float."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.numerics.formats import E4M3, Format
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.rounding import seal

# What steps may be stored as. Float8 steps are multiples of one float32 step for all of them.
STEP_DTYPES = ("float32", "bfloat16", "float16", "float8_e8m0fnu", "float8_e4m3fn")
# The smallest normal float32: accelerators take smaller numbers for zero.
TINY = float(jnp.finfo(jnp.float32).tiny)


def step_of(
    low: jax.Array,
    high: jax.Array,
    fmt: Format,
    symmetric: bool,
    of_nothing: float | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """The step and the integer zero point that cover ``[low, high]``.

    Symmetric: ``scale = max(|low|, |high|) / top``, no zero point, where ``top`` is
    ``qmax + 1/2`` for integers and the largest level otherwise. Asymmetric, for integers only: the
    range is widened to hold 0, ``scale = (high - low) / (qmax - qmin)`` and
    ``zero = qmin - round(low / scale)``, so that 0.0 is represented exactly.

    Args:
        low: Float32 minima.
        high: Float32 maxima, the same shape. Without an end, or NaN, the step is NaN.
        fmt: The number format.
        symmetric: Whether the grid is centred on zero.
        of_nothing: The step of a range too small for a normal float32 step; by default 1, and with
            it codes of zero, or in a format without a zero the smallest normal step.

    Returns:
        ``(scale, zero)``: float32, and integers of the signedness of codes or None.

    References:
        Jacob et al., 2018, Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference.
    """
    if symmetric:
        return symmetric_step(jnp.maximum(jnp.abs(low), jnp.abs(high)), fmt, of_nothing), None
    qmin, qmax = fmt.grid.low, fmt.grid.high
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    of_nothing = 1.0 if of_nothing is None else of_nothing
    # Halves: high - low overflows for ranges over half of float32's.
    scale = _step(high / 2 - low / 2, (qmax - qmin) / 2, of_nothing)
    # In 1 bit the largest range has a larger step.
    scale = jnp.minimum(scale, jnp.finfo(jnp.float32).max)
    zero = jnp.clip(qmin - jnp.round(low / scale), qmin, qmax)
    return scale, zero.astype(zero_dtype(fmt))


def within_dtype(scale: jax.Array, zero: jax.Array | None, fmt: Format, dtype) -> jax.Array:
    """Steps of an integer format, small enough that every level is finite in ``dtype``.

    The outermost level lies up to half a step beyond the range. Where the range reaches the largest
    number of ``dtype``, a product with codes would take it for more than the stored weight can be.

    Returns:
        ``min(scale, max(dtype) / max |q - zero|)``; other formats' steps as they are.
    """
    if not isinstance(fmt.grid, Integers):
        return scale
    low, high = float(fmt.grid.low), float(fmt.grid.high)
    zero = jnp.zeros((), jnp.float32) if zero is None else zero.astype(jnp.float32)
    # Rounded down: the quotient of the largest number may not be rounded to more.
    top = float(jnp.finfo(dtype).max) * (1 - 2.0**-23)
    return jnp.minimum(scale, top / jnp.maximum(high - zero, zero - low))


def symmetric_step(reach: jax.Array, fmt: Format, of_nothing: float | None = None) -> jax.Array:
    """As `step_of`, of the largest magnitudes."""
    if of_nothing is None:
        of_nothing = 1.0 if fmt.has_zero else TINY
    return _step(reach, fmt.top, of_nothing)


def _step(reach: jax.Array, top: float, of_nothing: float) -> jax.Array:
    """``reach / top`` in float32."""
    # A NaN stays one, for whoever watches for it.
    reach = jnp.where(jnp.isfinite(reach), reach, jnp.nan)
    divisor = _unknown(top, reach)
    reach = jnp.where(reach < TINY * max(top, 1), of_nothing * top, reach).astype(jnp.float32)
    # Compilers would rewrite a division by this quotient, which then rounds differently.
    return lax.optimization_barrier(reach / divisor)


def _unknown(value: float, like: jax.Array) -> jax.Array:
    """A float32 constant in a shape, as data: compilers divide by constants through reciprocals.

    It depends on ``like``, so that under vmap it is no constant beside a batch either.
    """
    return lax.optimization_barrier(jnp.where(jnp.isnan(like), like, value).astype(jnp.float32))


def shorter_steps(scale: jax.Array, dtype) -> jax.Array:
    """Float32 steps as bfloat16 or float16, those beyond its range at its ends.

    Returns:
        ``dtype``, the shape of ``scale``: positive, finite, and normal as float32.
    """
    info = jnp.finfo(dtype)
    least = max(float(info.smallest_subnormal), TINY)
    return seal(jnp.clip(scale, least, float(info.max)), dtype)


def zero_dtype(fmt: Format):
    """The dtype of zero points: the bytes that hold codes."""
    if fmt.bits > 8:
        return jnp.dtype(jnp.int16)
    return jnp.dtype(jnp.int8 if fmt.grid.signed else jnp.uint8)


def power_of_two_step(low: jax.Array, high: jax.Array, fmt: Format) -> jax.Array:
    r"""The largest power of two that brings the binade of the magnitudes to that of the top level.

    .. math:: 2^{\lfloor \log_2 \max(|l|, |h|) \rfloor - \lfloor \log_2 top \rfloor}

    Magnitudes up to a binade's end may lie beyond the top level, which then takes them.

    Returns:
        float8_e8m0fnu, the shape of ``low``; 1 for a range of zero, NaN for one without an end.

    References:
        Rouhani et al., 2023, Microscaling Data Formats for Deep Learning.
    """
    absmax = jnp.maximum(jnp.abs(low), jnp.abs(high)).astype(jnp.float32)
    exponent = _exponent(absmax) - (_exponent(jnp.float32(fmt.top)) - 127)
    # 255 is NaN, and 0 a subnormal float32; a range of zero has no exponent.
    exponent = jnp.where(absmax == 0, 127, jnp.clip(exponent, 1, 254))
    exponent = jnp.where(jnp.isfinite(absmax), exponent, 255)
    return lax.bitcast_convert_type(exponent.astype(jnp.uint8), jnp.float8_e8m0fnu)


def float8_steps(scale: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Float32 steps as float8_e4m3fn multiples of one float32 step.

    Args:
        scale: Float32 steps; 0 where there are no values.
        axes: The axes along which all share that one step.

    Returns:
        ``(codes, outer)``: float8_e4m3fn of the shape of ``scale``, at least its smallest number,
        and float32 of size 1 along ``axes``, so that the largest code is 448.

    References:
        NVIDIA, 2025, Introducing NVFP4 for Efficient and Accurate Low-Precision Inference.
    """
    sizes = [1 if d - scale.ndim in axes else n for d, n in enumerate(scale.shape)]
    high = jnp.max(scale, axes, keepdims=True) if scale.size else jnp.zeros(sizes)
    # The smallest multiple of it is a normal float.
    outer = jnp.maximum(high / _unknown(E4M3.high, high), TINY / E4M3.least).astype(jnp.float32)
    codes = jnp.maximum(E4M3.round(scale / lax.optimization_barrier(outer)), E4M3.least)
    return codes.astype(jnp.float8_e4m3fn), outer


def step_value(scale: jax.Array) -> jax.Array:
    """Stored steps as float32.

    Args:
        scale: float32, bfloat16, float16, float8_e4m3fn or float8_e8m0fnu.
    """
    if scale.dtype == jnp.float8_e8m0fnu:
        return power_of(lax.bitcast_convert_type(scale, jnp.uint8))
    return scale.astype(jnp.float32)


def power_of(exponent: jax.Array) -> jax.Array:
    """The float32 powers of two that the bits of float8_e8m0fnu stand for, as uint8."""
    exponent = exponent.astype(jnp.int32)
    # The largest is NaN, of which a shift alone would make infinity.
    nan = (exponent == 255).astype(jnp.int32)
    return lax.bitcast_convert_type((exponent << 23) | nan, jnp.float32)


def _exponent(x: jax.Array) -> jax.Array:
    return (lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF
