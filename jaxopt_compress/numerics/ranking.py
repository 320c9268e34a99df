"""The order of scores, everywhere in this package.

For floats without a sign, the order of the bit patterns read as integers is that of the values.

- The sign is ignored: the order is that of ``abs(scores)``, ``-0 == +0``, and weights may be
  passed as they are. Subnormal numbers are told apart.
- NaN cannot be refused inside a compiled function. All NaNs are equal and larger than infinity, so
  they are kept: a diverged tensor stays visible, and the counts stay exact.
- Among equal scores the lower row-major index is kept first.
"""

import jax
import jax.numpy as jnp
from jax import lax

MAX_SIZE = 2**31 - 32  # positions and thresholds are int32


def integer_type(dtype) -> jnp.dtype:
    """The integer type as wide as a floating one."""
    return jnp.dtype(f"int{8 * jnp.dtype(dtype).itemsize}")


def top_pattern(dtype) -> int:
    """One more than the pattern that stands for all NaNs, which is one more than infinity's."""
    info = jnp.finfo(dtype)
    return (((1 << info.nexp) - 1) << info.nmant) + 2


def magnitude_patterns(scores: jax.Array) -> jax.Array:
    """Integers in the order of ``abs(scores)``, at least 32 bits wide."""
    integer = integer_type(scores.dtype)
    bits = lax.bitcast_convert_type(scores, integer) & jnp.iinfo(integer).max
    bits = jnp.minimum(bits, jnp.asarray(top_pattern(scores.dtype) - 1, integer))
    return bits if bits.dtype.itemsize >= 4 else bits.astype(jnp.int32)


def value_of(pattern: jax.Array, dtype) -> jax.Array:
    """The float that a pattern stands for."""
    return lax.bitcast_convert_type(pattern.astype(integer_type(dtype)), dtype)


def among(scores: jax.Array, allowed: jax.Array) -> jax.Array:
    """Scores in the same order in which every entry that is not allowed comes last.

    Args:
        scores: Floats; the sign is ignored.
        allowed: Booleans that broadcast to their shape.

    Returns:
        The next larger magnitudes, and 0 where an entry is not allowed: so 0 itself, which may be
        a score, is above all of those.
    """
    bits = lax.bitcast_convert_type(scores, integer_type(scores.dtype))
    bits = bits & jnp.iinfo(bits.dtype).max
    up = jnp.minimum(bits, jnp.asarray(top_pattern(scores.dtype) - 2, bits.dtype)) + 1
    return lax.bitcast_convert_type(jnp.where(allowed, up, 0), scores.dtype)


def nonnegative(scores: jax.Array) -> jax.Array:
    """Float32 scores of either sign as nonnegative ones in the same order.

    Half of all floats are nonnegative: scores that differ in the last bit alone may become equal.

    Args:
        scores: Floats of any shape, converted to float32.

    Returns:
        Float32; NaN stays NaN.

    Example:
        >>> found = nonnegative(jnp.array([-2.0, -1.0, 0.0, 1.0]))
        >>> bool(jnp.all(found >= 0)), bool(jnp.all(jnp.diff(found) > 0))
        (True, True)
    """
    wide = scores.astype(jnp.float32)
    bits = lax.bitcast_convert_type(wide, jnp.int32)
    half = (bits & 0x7FFFFFFF) >> 1
    moved = 0x3FC00000 + jnp.where(bits < 0, -half, half)
    return jnp.where(jnp.isnan(wide), wide, lax.bitcast_convert_type(moved, jnp.float32))


def check_scores(scores: jax.Array, size: int) -> None:
    """Refuses what cannot be ranked.

    Raises:
        ValueError: More entries than int32 can count.
        TypeError: The scores are not floats of at least 16 bits.
    """
    if not jnp.issubdtype(scores.dtype, jnp.floating) or scores.dtype.itemsize < 2:
        raise TypeError(
            f"scores of shape {scores.shape} have dtype {scores.dtype}; float16, bfloat16, "
            "float32 and float64 can be ranked"
        )
    if size > MAX_SIZE:
        raise ValueError(
            f"{size} entries are ranked together, at most {MAX_SIZE} can be; "
            "treat leading axes as a stack, or rank each leaf alone"
        )
