"""Rounding floats to the levels of a format, levels as codes, and codes as levels."""

import jax
import jax.numpy as jnp

from jaxopt_compress.numerics.formats import Format
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.rounding import seal


def round_to_grid(
    x: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    fmt: Format,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The nearest level of each entry, and which entries were in range.

    Integers: ``clip(round(x * (1 / scale)) + zero, qmin, qmax)``, ties to even, where both factors
    are rounded to float32; steps above ``2**126``, whose reciprocals are subnormal, give zeros.
    Other grids take the level nearest to ``x * (1 / scale)``, the outermost at most.

    Args:
        x: Floats, any shape.
        scale: Float32 steps that broadcast against ``x``.
        zero: Integer zero points that broadcast likewise, or None; for integers only.
        fmt: The number format.
        noise: For stochastic rounding: uniform in [0, 1), of the shape of ``x``.

    Returns:
        ``(levels, inside)``: float32, with the zero point still added, and booleans: an entry is
        inside if rounding alone brought it to its level.
    """
    # A division by a broadcast or constant scale becomes this in some programs and not in others.
    ratio = x.astype(jnp.float32) * (1 / scale)
    level = fmt.grid.round(ratio, noise)
    if isinstance(fmt.grid, Integers):
        free = level if zero is None else level + zero.astype(jnp.float32)
        level = jnp.clip(free, fmt.grid.low, fmt.grid.high)
        inside = level == free
    else:
        inside = between_ends(ratio, fmt)
    return level, inside


def between_ends(ratio: jax.Array, fmt: Format) -> jax.Array:
    """Whether ``x * (1 / step)`` lies between the outermost levels.

    The value that set the step does, although its ratio may be rounded to just above the top.
    """
    slack = 1 + 2.0**-22
    return (ratio >= fmt.grid.low * slack) & (ratio <= fmt.grid.high * slack)


def encode(levels: jax.Array, fmt: Format) -> jax.Array:
    """The codes, one per entry, of levels that `round_to_grid` returned.

    Returns:
        Codes in ``fmt.dtype``: integers, bit patterns, positions in a table, or 8-bit floats.
    """
    if jnp.issubdtype(fmt.dtype, jnp.floating):
        # Zero has one code.
        return jnp.where(levels == 0, 0, levels).astype(fmt.dtype)
    return fmt.grid.encode(levels).astype(fmt.dtype)


def levels_of(codes: jax.Array, fmt: Format) -> jax.Array:
    """Inverts `encode`: float32 levels."""
    if jnp.issubdtype(codes.dtype, jnp.floating):
        return codes.astype(jnp.float32)
    return fmt.grid.decode(codes)


def decode(levels: jax.Array, scale: jax.Array, dtype) -> jax.Array:
    """``levels * scale`` in float32, rounded once to ``dtype`` and kept finite.

    The lowest code of a symmetric format lies half a step beyond the largest magnitude, which near
    the top of a format's range would overflow.
    """
    top = float(jnp.finfo(dtype).max)
    value = jnp.clip(levels.astype(jnp.float32) * scale, -top, top)
    return seal(value, dtype)
