"""Sub-byte codes in planar uint8 words, and bit masks.

Planar means that a word holds entries that are far apart. A block of ``block`` consecutive entries
is cut into runs, and word ``i`` of each row of words holds entry ``i`` of some of them: the block
is unpacked by shifting rows of words by constants, elementwise work that a compiler fuses into what
consumes it; neighbours in one byte would need an interleave, which costs copies.

`layout` says how many rows of words and runs there are. For 1, 2 and 4 bits there is one row, whose
words hold a code of each run. Words of 3, 5, 6 and 7 bits have a few bits left beside their whole
codes; those of all rows together, the first row lowest, hold the codes of the last runs.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Words(NamedTuple):
    """How a block of entries is laid out in words.

    Attributes:
        rows: Rows of words.
        whole: Codes that each word holds by itself: run ``j * rows + k`` is in row ``k``, in the
            bits ``[j * bits, (j + 1) * bits)``.
        split: Runs in the left-over bits: run ``rows * whole + t`` in their bits
            ``[t * bits, (t + 1) * bits)``.
        spare: Left-over bits per word, its highest ones.
    """

    rows: int
    whole: int
    split: int
    spare: int

    @property
    def runs(self) -> int:
        """Runs per block; a block is a multiple of it."""
        return self.rows * self.whole + self.split


def layout(bits: int) -> Words:
    """The layout for codes of 1 to 7 bits.

    Example:
        >>> layout(4), layout(3)
        (Words(rows=1, whole=2, split=0, spare=0), Words(rows=3, whole=2, split=2, spare=2))
    """
    if not 1 <= bits <= 7:
        raise ValueError(f"cannot pack {bits}-bit codes; packed widths are 1 to 7 bits")
    whole = 8 // bits
    spare = 8 - whole * bits
    rows = bits // math.gcd(bits, 8) if spare else 1
    return Words(rows, whole, rows * spare // bits, spare)


def pack(codes: jax.Array, bits: int, axis: int, block: int) -> jax.Array:
    """Packs codes of ``bits`` bits into planar uint8 words along ``axis``.

    Args:
        codes: Integers of at most ``bits`` bits, signed or not, any shape.
        bits: From 1 to 7.
        axis: The axis to pack, its length a multiple of ``block``.
        block: Entries per block, a multiple of ``layout(bits).runs``.

    Returns:
        uint8 words: the shape of ``codes`` with ``axis`` shorter by a factor of ``8 / bits``; for
        each block its rows of words, one after the other.

    Example:
        >>> import jax.numpy as jnp
        >>> pack(jnp.array([1, -2, 0, -1], jnp.int8), bits=2, axis=0, block=4)
        Array([201], dtype=uint8)
    """
    how, axis = layout(bits), axis % codes.ndim
    _check_block(codes.shape[axis], bits, block)
    before, after = codes.shape[:axis], codes.shape[axis + 1 :]
    low = codes.astype(jnp.int8 if codes.dtype != jnp.uint8 else jnp.uint8).astype(jnp.uint8)
    low = low & jnp.uint8((1 << bits) - 1)
    low = low.reshape(*before, codes.shape[axis] // block, how.runs, block // how.runs, *after)
    runs = [lax.index_in_dim(low, r, axis + 1, keepdims=False) for r in range(how.runs)]
    spare = jnp.zeros(runs[0].shape, jnp.int32)
    for t, run in enumerate(runs[how.rows * how.whole :]):
        spare = spare | (run.astype(jnp.int32) << (t * bits))
    rows = []
    for k in range(how.rows):
        part = (spare >> (k * how.spare)) & ((1 << how.spare) - 1)
        word = (part << (8 - how.spare)).astype(jnp.uint8) if how.spare else jnp.uint8(0)
        for j in range(how.whole):
            word = word | (runs[j * how.rows + k] << jnp.uint8(j * bits))
        rows.append(word)
    words = jnp.stack(rows, axis + 1)
    return words.reshape(*before, codes.shape[axis] * bits // 8, *after)


def unpack(words: jax.Array, bits: int, axis: int, block: int, signed: bool = True) -> jax.Array:
    """Inverts `pack`: int8 or uint8 codes with ``axis`` longer by a factor of ``8 / bits``.

    Example:
        >>> import jax.numpy as jnp
        >>> unpack(jnp.array([201], jnp.uint8), bits=2, axis=0, block=4)
        Array([ 1, -2,  0, -1], dtype=int8)
    """
    how, axis = layout(bits), axis % words.ndim
    length = words.shape[axis] * 8 // bits
    _check_block(length, bits, block)
    before, after = words.shape[:axis], words.shape[axis + 1 :]
    blocks, width = length // block, block // how.runs
    rows = words.reshape(*before, blocks, how.rows, width, *after)
    parts = split_codes(rows, bits, axis + 1, signed)
    return jnp.concatenate(parts, axis + 1).reshape(*before, length, *after)


def split_codes(rows: jax.Array, bits: int, axis: int, signed: bool) -> list[jax.Array]:
    """The codes that words hold by themselves, and those that they hold together, if there are any.

    Args:
        rows: Words, the rows of a block along ``axis``.
        bits: From 1 to 7.
        axis: From the front.
        signed: Whether codes are signed.

    Returns:
        One or two arrays of int8 or uint8 codes, with runs along ``axis``, in order.
    """
    how = layout(bits)
    before, after = rows.shape[:axis], rows.shape[axis + 1 :]
    # Broadcast, shift by a constant per run: elementwise work that fuses into what consumes it.
    wide = jnp.broadcast_to(
        jnp.expand_dims(rows, axis), (*before, how.whole, how.rows, *after)
    ).reshape(*before, how.whole * how.rows, *after)
    left = np.repeat(8 - bits * np.arange(1, how.whole + 1), how.rows).astype(np.uint8)
    constant = lambda x: jnp.broadcast_to(x.reshape(-1, *(1,) * len(after)), wide.shape)
    parts = [_shift_down(lax.shift_left(wide, constant(left)), bits, signed)]
    if how.split:
        spare = jnp.zeros((*before, *after), jnp.int32)
        for k in range(how.rows):
            row = lax.index_in_dim(rows, k, axis, keepdims=False).astype(jnp.int32)
            spare = spare | ((row >> (8 - how.spare)) << (k * how.spare))
        codes = [((spare >> (t * bits)) << (8 - bits)).astype(jnp.uint8) for t in range(how.split)]
        parts.append(_shift_down(jnp.stack(codes, axis), bits, signed))
    return parts


def _shift_down(high: jax.Array, bits: int, signed: bool) -> jax.Array:
    """Codes from the highest bits of bytes."""
    if not signed:
        return lax.shift_right_logical(high, jnp.full_like(high, 8 - bits))
    high = lax.bitcast_convert_type(high, jnp.int8)
    return lax.shift_right_arithmetic(high, jnp.full_like(high, 8 - bits))


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
    bit = np.arange(8, dtype=np.uint8).reshape(*(1,) * (axis + 1), 8, *(1,) * len(after))
    mask = (wide >> bit) & np.uint8(1) != 0
    mask = mask.reshape(*before, 8 * words.shape[axis], *after)
    return mask if length is None else lax.slice_in_dim(mask, 0, length, axis=axis)


def _check_block(length: int, bits: int, block: int) -> None:
    runs = layout(bits).runs
    if block % runs or length % block:
        raise ValueError(
            f"cannot pack {length} entries of {bits} bits in blocks of {block}: the block must be "
            f"a multiple of {runs} and divide {length}"
        )
