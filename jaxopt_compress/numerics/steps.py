"""The step between levels: from a range, in float32 or as a shorter float."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.numerics.formats import E4M3, Format

# What steps may be stored as. Float8 steps are multiples of one float32 step for all of them.
STEP_DTYPES = ("float32", "bfloat16", "float16", "float8_e8m0fnu", "float8_e4m3fn")


def step_of(low: jax.Array, high: jax.Array, fmt: Format, symmetric: bool):
    """The step and the integer zero point that cover ``[low, high]``.

    Symmetric: ``scale = max(|low|, |high|) / top``, no zero point, where ``top`` is
    ``qmax + 1/2`` for integers and the largest level otherwise. Asymmetric, for integers only: the
    range is widened to hold 0, ``scale = (high - low) / (qmax - qmin)`` and
    ``zero = qmin - round(low / scale)``, so that 0.0 is represented exactly.

    Args:
        low: Float32 minima.
        high: Float32 maxima, the same shape.
        fmt: The number format.
        symmetric: Whether the grid is centred on zero.

    Returns:
        ``(scale, zero)``: float32, and integers of the signedness of codes or None. A range too
        small for a normal float32 step gets the step 1, and with it codes of zero.

    References:
        Jacob et al., 2018, Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference.
    """
    qmin, qmax = fmt.grid.low, fmt.grid.high
    # Unknown to the compiler, which would divide by constants through their reciprocals.
    steps = fmt.top if symmetric else (qmax - qmin) / 2
    steps = lax.optimization_barrier(jnp.full(low.shape, steps, jnp.float32))
    if symmetric:
        scale = jnp.maximum(jnp.abs(low), jnp.abs(high)) / steps
    else:
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        # Halves first: high - low overflows for ranges over half of float32's.
        scale = jnp.minimum((high / 2 - low / 2) / steps, jnp.finfo(jnp.float32).max)
    scale = jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 1.0).astype(jnp.float32)
    if symmetric:
        return scale, None
    zero = jnp.clip(qmin - jnp.round(low / lax.optimization_barrier(scale)), qmin, qmax)
    return scale, zero.astype(zero_dtype(fmt))


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
        float8_e8m0fnu, the shape of ``low``; 1 for a range of zero.

    References:
        Rouhani et al., 2023, Microscaling Data Formats for Deep Learning.
    """
    absmax = jnp.maximum(jnp.abs(low), jnp.abs(high)).astype(jnp.float32)
    exponent = _exponent(absmax) - (_exponent(jnp.float32(fmt.top)) - 127)
    # 255 is NaN, and 0 a subnormal float32; a range of zero has no exponent.
    exponent = jnp.where(absmax > 0, jnp.clip(exponent, 1, 254), 127)
    return lax.bitcast_convert_type(exponent.astype(jnp.uint8), jnp.float8_e8m0fnu)


def float8_steps(scale: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Float32 steps as float8_e4m3fn multiples of one float32 step.

    Args:
        scale: Float32 steps.
        axes: The axes along which all share that one step.

    Returns:
        ``(codes, outer)``: float8_e4m3fn of the shape of ``scale``, at least its smallest number,
        and float32 of size 1 along ``axes``, so that the largest code is 448.

    References:
        NVIDIA, 2025, Introducing NVFP4 for Efficient and Accurate Low-Precision Inference.
    """
    sizes = [1 if d - scale.ndim in axes else n for d, n in enumerate(scale.shape)]
    high = jnp.max(scale, axes, keepdims=True) if scale.size else jnp.zeros(sizes)
    top = lax.optimization_barrier(jnp.full(sizes, E4M3.high, jnp.float32))
    # Not below the normal floats, which small steps then are smaller multiples of.
    outer = jnp.maximum(high / top, jnp.finfo(jnp.float32).tiny).astype(jnp.float32)
    codes = jnp.maximum(E4M3.round(scale / lax.optimization_barrier(outer)), E4M3.least)
    return codes.astype(jnp.float8_e4m3fn), outer


def step_value(scale: jax.Array) -> jax.Array:
    """Stored steps as float32.

    Args:
        scale: float32, bfloat16, float16, float8_e4m3fn or float8_e8m0fnu.
    """
    if scale.dtype == jnp.float8_e8m0fnu:
        exponent = lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.int32)
        return lax.bitcast_convert_type(exponent << 23, jnp.float32)
    return scale.astype(jnp.float32)


def _exponent(x: jax.Array) -> jax.Array:
    return (lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF
