"""Sub-byte integers in planar uint8 words, and bit masks.

Planar means that a word holds entries that lie far apart: a block of ``block`` consecutive entries
is cut into ``8 // bits`` runs, and word ``i`` of the block holds entry ``i`` of every run. So runs
are unpacked by repeating words and shifting them by constants, elementwise work that a compiler
fuses into what consumes it; neighbours in one byte would need an interleave, which costs copies.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PACKED_BITS = (1, 2, 4)


def pack(codes: jax.Array, bits: int, axis: int, block: int) -> jax.Array:
    """Packs signed integers of ``bits`` bits into planar uint8 words along ``axis``.

    Word ``i`` of a block holds entry ``i + j * block * bits / 8`` of that block in its bits
    ``[j * bits, (j + 1) * bits)``.

    Args:
        codes: Integers in ``[-2**(bits-1), 2**(bits-1))``, any signed dtype, any shape.
        bits: 1, 2 or 4.
        axis: The axis to pack, its length a multiple of ``block``.
        block: Entries per block, a multiple of ``8 // bits``.

    Returns:
        uint8 words: the shape of ``codes`` with ``axis`` shorter by a factor of ``8 // bits``.

    Example:
        >>> import jax.numpy as jnp
        >>> pack(jnp.array([1, -2, 0, -1], jnp.int8), bits=2, axis=0, block=4)
        Array([201], dtype=uint8)
    """
    runs = 8 // bits
    axis = axis % codes.ndim
    _check_block(codes.shape[axis], bits, block)
    low = codes.astype(jnp.int8).astype(jnp.uint8) & jnp.uint8((1 << bits) - 1)
    split = (codes.shape[axis] // block, runs, block // runs)
    low = low.reshape(*codes.shape[:axis], *split, *codes.shape[axis + 1 :])
    words = jnp.zeros((), jnp.uint8)
    for j in range(runs):
        words = words | (lax.index_in_dim(low, j, axis + 1, keepdims=False) << jnp.uint8(j * bits))
    shape = (*codes.shape[:axis], codes.shape[axis] // runs, *codes.shape[axis + 1 :])
    return words.reshape(shape)


def unpack(words: jax.Array, bits: int, axis: int, block: int) -> jax.Array:
    """Inverts `pack`: int8 codes with ``axis`` longer by a factor of ``8 // bits``.

    Example:
        >>> import jax.numpy as jnp
        >>> unpack(jnp.array([201], jnp.uint8), bits=2, axis=0, block=4)
        Array([ 1, -2,  0, -1], dtype=int8)
    """
    runs = 8 // bits
    axis = axis % words.ndim
    length = words.shape[axis] * runs
    _check_block(length, bits, block)
    before, after = words.shape[:axis], words.shape[axis + 1 :]
    blocks, width = length // block, block // runs
    # Broadcast, shift by a constant per row: elementwise work that fuses into what consumes it.
    spread = jnp.broadcast_to(
        words.reshape(*before, blocks, 1, width, *after), (*before, blocks, runs, width, *after)
    ).reshape(*before, length, *after)
    left = np.tile(np.repeat(8 - bits * np.arange(1, runs + 1), width), blocks).astype(np.uint8)
    shifted = lax.shift_left(
        spread, jnp.broadcast_to(left.reshape(-1, *(1,) * len(after)), spread.shape)
    )
    signed = lax.bitcast_convert_type(shifted, jnp.int8)
    return lax.shift_right_arithmetic(signed, jnp.full_like(signed, 8 - bits))


def pack_mask(mask: jax.Array, axis: int) -> jax.Array:
    """Packs booleans along ``axis``, 8 to a uint8 word, the first one in the lowest bit.

    The last word is filled up with zeros.

    Example:
        >>> import jax.numpy as jnp
        >>> pack_mask(jnp.array([True, False, True]), 0)
        Array([5], dtype=uint8)
    """
    return jnp.packbits(mask, axis=axis, bitorder="little")


def unpack_mask(words: jax.Array, axis: int, length: int | None = None) -> jax.Array:
    """Inverts `pack_mask`; ``length`` cuts what was filled up."""
    axis = axis % words.ndim
    before, after = words.shape[:axis], words.shape[axis + 1 :]
    wide = jnp.broadcast_to(jnp.expand_dims(words, axis + 1), (*words.shape[: axis + 1], 8, *after))
    bit = np.arange(8, dtype=np.uint8).reshape(8, *(1,) * len(after))
    mask = (wide >> bit) & np.uint8(1) != 0
    mask = mask.reshape(*before, 8 * words.shape[axis], *after)
    return mask if length is None else lax.slice_in_dim(mask, 0, length, axis=axis)


def _check_block(length: int, bits: int, block: int) -> None:
    if bits not in PACKED_BITS:
        raise ValueError(f"cannot pack {bits}-bit codes; packed widths are {PACKED_BITS}")
    if block % (8 // bits) or length % block:
        raise ValueError(
            f"cannot pack {length} entries of {bits} bits in blocks of {block}: the block must be "
            f"a multiple of {8 // bits} and divide {length}"
        )
