"""Number formats and the rounding between floats and their codes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_compress.numerics.rounding import seal


class Format(NamedTuple):
    """A signed integer format.

    Attributes:
        name: Its usual name, such as ``"int4"``.
        bits: Stored bits per code.
        dtype: The dtype that holds one code in memory when it is not packed.
        packed: Whether codes live in memory as planar uint8 words.
    """

    name: str
    bits: int
    dtype: np.dtype
    packed: bool

    @property
    def qmin(self) -> int:
        """The lowest code."""
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The highest code."""
        return 2 ** (self.bits - 1) - 1


FORMATS = {
    f.name: f
    for f in (
        Format("int8", 8, np.dtype(np.int8), False),
        Format("int4", 4, np.dtype(jnp.int4), False),
        Format("int2", 2, np.dtype(np.int8), True),
    )
}


def format_of(name: str | Format) -> Format:
    """Looks a format up by its name.

    Raises:
        ValueError: An unknown name; lists those there are.
    """
    if isinstance(name, Format):
        return name
    if name not in FORMATS:
        raise ValueError(f"unknown number format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def absmax_scale(low: jax.Array, high: jax.Array, fmt: Format, symmetric: bool):
    """The step and the integer zero point that cover ``[low, high]``.

    Symmetric: ``scale = max(|low|, |high|) / (qmax + 1/2)``, no zero point. Asymmetric: the range
    is widened to hold 0, ``scale = (high - low) / (qmax - qmin)`` and
    ``zero = qmin - round(low / scale)``, so that 0.0 is represented exactly.

    Args:
        low: Float32 minima.
        high: Float32 maxima, the same shape.
        fmt: The number format.
        symmetric: Whether the grid is centred on zero.

    Returns:
        ``(scale, zero)``: float32, and int8 or None. A range too small for a normal float32 step
        gets the step 1, and with it codes of zero.

    References:
        Jacob et al., 2018, Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference.
    """
    # Unknown to the compiler, which would divide by constants through their reciprocals.
    steps = fmt.qmax + 0.5 if symmetric else (fmt.qmax - fmt.qmin) / 2
    steps = lax.optimization_barrier(jnp.full(low.shape, steps, jnp.float32))
    if symmetric:
        scale = jnp.maximum(jnp.abs(low), jnp.abs(high)) / steps
    else:
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        # Halves first: high - low overflows for ranges over half of float32's.
        scale = (high / 2 - low / 2) / steps
    scale = jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 1.0).astype(jnp.float32)
    if symmetric:
        return scale, None
    zero = jnp.clip(fmt.qmin - jnp.round(low / lax.optimization_barrier(scale)), fmt.qmin, fmt.qmax)
    return scale, zero.astype(jnp.int8)


def encode(x: jax.Array, scale: jax.Array, zero: jax.Array | None, fmt: Format):
    """Rounds to the nearest code (ties to even), and says which entries were in range.

    ``codes = clip(round(x * (1 / scale)) + zero, qmin, qmax)``, where both factors are rounded to
    float32; steps above ``2**126``, whose reciprocals are subnormal, give codes of zero.

    Args:
        x: Floats, any shape.
        scale: Float32 steps that broadcast against ``x``.
        zero: Integer zero points that broadcast likewise, or None.
        fmt: The number format.

    Returns:
        ``(codes, inside)``: int8 codes and booleans, both of the shape of ``x``; an entry is inside
        if rounding alone brought it to a code.
    """
    levels, inside = round_to_grid(x, scale, zero, fmt)
    return levels.astype(jnp.int8), inside


def round_to_grid(x: jax.Array, scale: jax.Array, zero: jax.Array | None, fmt: Format):
    """The codes of `encode` before they are made integers: ``(float32 codes, inside)``."""
    # A division by a broadcast or constant scale becomes this in some programs and not in others.
    level = jnp.round(x.astype(jnp.float32) * (1 / scale))
    if zero is not None:
        level = level + zero.astype(jnp.float32)
    codes = jnp.clip(level, fmt.qmin, fmt.qmax)
    return codes, codes == level


def decode(levels: jax.Array, scale: jax.Array, dtype) -> jax.Array:
    """``levels * scale`` in float32, rounded once to ``dtype`` and kept finite.

    The lowest code of a symmetric format lies half a step beyond the largest magnitude, which near
    the top of a format's range would overflow.
    """
    top = float(jnp.finfo(dtype).max)
    value = jnp.clip(levels.astype(jnp.float32) * scale, -top, top)
    return seal(value, dtype)
