"""Noise without a key, for what is rounded where no key can be carried."""

import jax
import jax.numpy as jnp
from jax import lax


def noise_of(x: jax.Array, salt: jax.Array | None = None) -> jax.Array:
    """Numbers in [0, 1) that look random: a hash of each entry's bits, its position and a salt.

    Local to each entry: nothing is gathered or carried along, however arrays are split. Equal
    entries at equal positions get equal noise, so without a salt a rounding that takes it keeps the
    expected value over entries, not over repetitions of the same array.

    Args:
        x: Float32, any shape.
        salt: uint32, a scalar such as the number of a step; or None.

    Returns:
        Float32 multiples of 2^-24, of the shape of ``x``.

    References:
        Wellons, 2018, Prospecting for Hash Functions.
    """
    position, size = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        index = lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position = position + index * jnp.uint32(size % 2**32)
        size *= x.shape[axis]
    # Positions are hashed first, so that those of neighbours share no bits.
    if salt is not None:
        position = position ^ _mixed(jnp.asarray(salt, jnp.uint32) + jnp.uint32(0x9E3779B9))
    bits = _mixed(lax.bitcast_convert_type(x, jnp.uint32) ^ _mixed(position))
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def _mixed(x: jax.Array) -> jax.Array:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
