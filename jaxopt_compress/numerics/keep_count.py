"""How many entries a sparsity keeps."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike


def keep_count(size: int, sparsity: ArrayLike) -> jax.Array:
    """Number of entries kept: ``size - round(size * sparsity)``, halves rounded up.

    The product is computed in integers and is exact for the sparsity as a float32; a float32
    product would be off by up to about a hundred entries at sizes near ``2**31``.

    Args:
        size: Number of entries, below ``2**31``.
        sparsity: Fraction pruned, float32 of any shape; clipped to ``[0, 1]``.

    Returns:
        Int32 of the sparsity's shape.

    Raises:
        ValueError: The size is out of range.

    Example:
        >>> keep_count(10, 0.25).item(), keep_count(2**31 - 1, 2.0**-24).item()
        (7, 2147483519)
    """
    if not 0 <= size < 2**31:
        raise ValueError(f"size={size}; sizes from 0 to {2**31 - 1} can be counted in int32")
    sparsity = jnp.clip(jnp.asarray(sparsity, jnp.float32), 0, 1)
    bits = lax.bitcast_convert_type(sparsity, jnp.uint32)
    exponent = bits >> 23
    # Below 1, sparsity == mantissa / 2**(24 + shift) with shift >= 0.
    mantissa = (bits & 0x7FFFFF) | jnp.where(exponent > 0, jnp.uint32(1 << 23), jnp.uint32(0))
    shift = 126 - jnp.clip(exponent, 1, 126)

    # size * mantissa in digits of 12 bits, for there are no 64-bit integers by default.
    low, high = mantissa & 0xFFF, mantissa >> 12
    s0, s1, s2 = (jnp.uint32(size >> k & 0xFFF) for k in (0, 12, 24))
    d0 = s0 * low
    d1 = s0 * high + s1 * low + (d0 >> 12)
    d2 = s1 * high + s2 * low + (d1 >> 12)
    d3 = s2 * high + (d2 >> 12)
    product = (d3 << 13) | ((d2 & 0xFFF) << 1) | ((d1 & 0xFFF) >> 11)  # the upper 32 of 55 bits
    doubled = jnp.where(shift < 32, product >> jnp.minimum(shift, 31), jnp.uint32(0))
    pruned = jnp.where(sparsity < 1, ((doubled + 1) >> 1).astype(jnp.int32), size)
    return size - pruned
