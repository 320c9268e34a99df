"""Planar words as codes and back, as in `numerics.packing`, in NumPy: nothing is compiled."""

import numpy as np

from jaxopt_compress.arrays.fields import Packing
from jaxopt_compress.numerics.packing import layout


def fits(shape: tuple[int, ...], how: Packing) -> bool:
    """Whether words of this shape are whole blocks."""
    bits, axis, block, _ = how
    if not (1 <= bits <= 7 and -len(shape) <= axis < 0 and 1 <= block < 2**40):
        return False
    length, rest = divmod(shape[axis] * 8, bits)
    return not rest and length % block == 0 and block % layout(bits).runs == 0


def unpack(words: np.ndarray, how: Packing) -> np.ndarray:
    """The codes in words, uint8 with zeros above their bits.

    Example:
        >>> unpack(np.array([201], np.uint8), Packing(2, -1, 4))
        array([1, 2, 0, 3], dtype=uint8)
    """
    bits, axis, block, _ = how
    form, mask = layout(bits), np.uint8(2**bits - 1)
    moved = np.moveaxis(words, axis, -1)
    length = moved.shape[-1] * 8 // bits
    width = block // form.runs
    rows = moved.reshape(*moved.shape[:-1], length // block, form.rows, width)
    codes = np.empty((*rows.shape[:-2], form.runs, width), np.uint8)
    for j in range(form.whole):
        own = slice(j * form.rows, (j + 1) * form.rows)
        codes[..., own, :] = rows >> np.uint8(j * bits) & mask
    if form.split:
        spare = np.zeros((*rows.shape[:-2], width), np.uint32)
        for k in range(form.rows):
            high = rows[..., k, :].astype(np.uint32) >> np.uint32(8 - form.spare)
            spare |= high << np.uint32(k * form.spare)
        for t in range(form.split):
            own = spare >> np.uint32(t * bits) & mask
            codes[..., form.rows * form.whole + t, :] = own.astype(np.uint8)
    return np.moveaxis(codes.reshape(*moved.shape[:-1], length), -1, axis)


def pack(codes: np.ndarray, how: Packing) -> np.ndarray:
    """Inverts `unpack`."""
    bits, axis, block, _ = how
    form = layout(bits)
    moved = np.moveaxis(codes, axis, -1)
    length, width = moved.shape[-1], block // form.runs
    runs = moved.reshape(*moved.shape[:-1], length // block, form.runs, width)
    rows = np.zeros((*runs.shape[:-2], form.rows, width), np.uint8)
    for j in range(form.whole):
        rows |= runs[..., j * form.rows : (j + 1) * form.rows, :] << np.uint8(j * bits)
    if form.split:
        spare = np.zeros((*runs.shape[:-2], width), np.uint32)
        for t in range(form.split):
            own = runs[..., form.rows * form.whole + t, :].astype(np.uint32)
            spare |= own << np.uint32(t * bits)
        for k in range(form.rows):
            part = spare >> np.uint32(k * form.spare) & np.uint32((1 << form.spare) - 1)
            rows[..., k, :] |= (part << np.uint32(8 - form.spare)).astype(np.uint8)
    words = rows.reshape(*moved.shape[:-1], length * bits // 8)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis))
