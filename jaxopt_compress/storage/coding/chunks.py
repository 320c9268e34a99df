"""One part of a stored array as a chunk of bytes: a form, and streams of symbols."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays.fields import Distances, Packing
from jaxopt_compress.numerics.sparse import gaps_of
from jaxopt_compress.storage.coding import blocks, integers, planar
from jaxopt_compress.storage.words import from_words, to_words

# What the first byte of a chunk says.
_STORED, _CODES, _PACKED, _PLANES, _INTEGERS, _RICE, _POSITIONS, _MASK, _KEPT = range(9)


class Form(NamedTuple):
    """What a part of a stored array is made of.

    Attributes:
        shape: The shape of the stored part.
        dtype: The dtype of the stored part: uint8 where it holds words.
        bits: Bits per code in its words, or None.
        axis: The negative axis along which words run, or None if they hold the flattened array.
        dense: The shape of the part in entries.
        signed: Whether entries are signed integers.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    bits: int | None
    axis: int | None
    dense: tuple[int, ...]
    signed: bool

    @property
    def columns(self) -> int:
        """Entries per row."""
        return self.dense[-1] if self.dense else 1

    @property
    def size(self) -> int:
        """Bytes of the stored part."""
        return math.prod(self.shape) * self.dtype.itemsize


def encode(part: np.ndarray, form: Form, packing: Packing | Distances | None, coding: str) -> bytes:
    """The chunk of a part.

    Args:
        part: The stored array, of the form's shape and dtype.
        form: What it is made of.
        packing: How its words hold codes, if they do and the form does not say it; or what its
            integers leave out.
        coding: One of `blocks.CODINGS`.

    Returns:
        Bytes, at most some more per block than those of the part.
    """
    found = [_stored(part, None)]
    if coding == "zstd" or jnp.issubdtype(form.dtype, jnp.inexact):
        found.append(_planes(part) if form.dtype.itemsize > 1 else _stored(part, coding))
    elif form.dtype.itemsize > 1:
        values = _unsigned(part)
        found += [bytes([_INTEGERS]) + integers.encode(values, coding), *_rice(values, found)]
    elif isinstance(packing, Packing) and planar.fits(form.shape, packing):
        found += _packed(part, packing, coding)
    else:
        bits = form.bits or 8
        symbols = _codes(part, form) ^ _middle(bits, form.signed)
        found.append(bytes([_CODES]) + blocks.encode(symbols, bits, coding, form.columns))
        if form.dtype == np.uint8 and form.bits is None:
            found += _rice(part.reshape(-1).astype(np.uint64), found)
    if isinstance(packing, Distances) and coding == "context":
        found += _kept(part, packing)
    return min(found, key=len)


def decode(raw: bytes | memoryview, form: Form) -> np.ndarray:
    """Inverts `encode`.

    Raises:
        ValueError: The bytes are no chunk of this form.
    """
    view = memoryview(raw)
    if not len(view) or view[0] not in _READERS:
        raise ValueError("it is coded in a form that is not known")
    part, used = _READERS[view[0]](view[1:], form)
    if used != len(view) - 1 or part.nbytes != form.size:
        raise ValueError(f"{used} of {len(view) - 1} bytes hold {part.nbytes} of {form.size}")
    return part.reshape(form.shape)


def _bytes_of(part: np.ndarray) -> np.ndarray:
    little = part.astype(part.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).reshape(-1).view(np.uint8)


def _typed(raw: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return raw.view(dtype.newbyteorder("<")).astype(dtype, copy=False)


def _stored(part: np.ndarray, coding: str | None) -> bytes:
    return bytes([_STORED]) + blocks.encode(_bytes_of(part), 8, coding)


def _from_stored(raw: memoryview, form: Form) -> tuple[np.ndarray, int]:
    found, used = blocks.decode(raw, form.size, 8)
    return _typed(found, form.dtype), used


def _codes(part: np.ndarray, form: Form) -> np.ndarray:
    if form.bits is None or form.bits == 8:
        return _bytes_of(part)
    codes = from_words(part, form.bits, form.axis, form.dense, np.dtype(np.uint8))
    return codes.reshape(-1)


def _from_codes(raw: memoryview, form: Form) -> tuple[np.ndarray, int]:
    bits = form.bits or 8
    symbols, used = blocks.decode(raw, math.prod(form.dense), bits, form.columns)
    symbols ^= _middle(bits, form.signed)
    if bits == 8:
        return _typed(symbols, form.dtype), used
    return to_words(symbols.reshape(form.dense), bits, form.axis), used


def _packed(part: np.ndarray, how: Packing, coding: str) -> list[bytes]:
    if how.bits == 1:
        # Words of masks: as bytes, or by the distances of their ones.
        found = [_stored(part, coding)]
        bits = np.unpackbits(part.reshape(-1), bitorder="little")
        if coding == "context":
            columns = how.columns or 8 * part.shape[-1]
            head = bytes([_MASK]) + blocks.varint(columns)
            found.append(head + blocks.encode(bits, 1, coding, columns))
        ones = np.flatnonzero(bits)
        if len(ones) < part.size:
            gaps = (np.diff(ones, prepend=-1) - 1).astype(np.uint64)
            head = bytes([_POSITIONS]) + blocks.varint(len(ones))
            found.append(head + bytes([_INTEGERS]) + integers.encode(gaps, coding))
            found += [head + raw for raw in _rice(gaps, found)]
        return found
    head = bytes([_PACKED, how.bits, -how.axis]) + blocks.varint(how.block)
    symbols = planar.unpack(part, how).reshape(-1) ^ _middle(how.bits, True)
    columns = part.shape[-1] * (8 if how.axis == -1 else how.bits) // how.bits
    return [head + blocks.encode(symbols, how.bits, coding, columns)]


def _from_packed(raw: memoryview, form: Form) -> tuple[np.ndarray, int]:
    if len(raw) < 3:
        raise ValueError("it is cut off")
    block, at = blocks.read_varint(raw, 2)
    how = Packing(raw[0], -raw[1], block)
    if form.dtype != np.uint8 or not planar.fits(form.shape, how):
        raise ValueError(f"{how} of words {form.shape}")
    shape = list(form.shape)
    shape[how.axis] = shape[how.axis] * 8 // how.bits
    symbols, used = blocks.decode(raw[at:], math.prod(shape), how.bits, shape[-1])
    symbols ^= _middle(how.bits, True)
    return planar.pack(symbols.reshape(shape), how), at + used


def _from_positions(raw: memoryview, form: Form) -> tuple[np.ndarray, int]:
    count, at = blocks.read_varint(raw, 0)
    if form.dtype != np.uint8 or count > 8 * form.size or at >= len(raw):
        raise ValueError(f"{count} positions in {form.size} bytes")
    if raw[at] not in (_INTEGERS, _RICE):
        raise ValueError("positions in a form that is not known")
    read = integers.decode if raw[at] == _INTEGERS else integers.decode_rice
    gaps, used = read(raw[at + 1 :], count)
    ones = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if count and not 0 <= ones.min() <= ones.max() < 8 * form.size:
        raise ValueError("positions beyond the end")
    bits = np.zeros(8 * form.size, np.uint8)
    bits[ones] = 1
    return np.packbits(bits, bitorder="little"), at + 1 + used


def _from_mask(raw: memoryview, form: Form) -> tuple[np.ndarray, int]:
    columns, at = blocks.read_varint(raw, 0)
    if form.dtype != np.uint8 or not 0 < columns < 2**40:
        raise ValueError(f"a mask with rows of {columns} in {form.dtype}")
    bits, used = blocks.decode(raw[at:], 8 * form.size, 1, columns)
    return np.packbits(bits, bitorder="little"), at + used


def _kept(part: np.ndarray, how: Distances) -> list[bytes]:
    """Distances as the mask that they stand for, where rows and columns say what is likely."""
    at = np.cumsum(part.reshape(-1, part.shape[-1]).astype(np.int64) + 1, -1) - 1
    mask = np.zeros((len(at), how.size + 1), np.uint8)
    np.put_along_axis(mask, np.minimum(at, how.size), 1, -1)
    mask = mask[:, :-1]
    if not np.array_equal(gaps_of(mask.astype(bool), part.shape[-1]), part.reshape(at.shape)):
        return []
    head = bytes([_KEPT]) + blocks.varint(how.size) + blocks.varint(how.columns)
    return [head + blocks.encode(mask.reshape(-1), 1, "context", how.columns)]


def _from_kept(raw: memoryview, form: Form) -> tuple[np.ndarray, int]:
    size, at = blocks.read_varint(raw, 0)
    columns, at = blocks.read_varint(raw, at)
    rows = math.prod(form.shape[:-1])
    if form.dtype.kind != "u" or not form.shape or not 0 < columns <= size <= 2**40:
        raise ValueError(f"a mask of rows of {size} in {form.dtype}{form.shape}")
    bits, used = blocks.decode(raw[at:], rows * size, 1, columns)
    mask = bits.reshape(rows, size).astype(bool)
    if (mask.sum(-1) > form.shape[-1]).any():
        raise ValueError(f"a mask of more than {form.shape[-1]} entries in a row")
    return gaps_of(mask, form.shape[-1]).astype(form.dtype), at + used


def _planes(part: np.ndarray) -> bytes:
    planes = _bytes_of(part).reshape(-1, part.dtype.itemsize).T
    coded = [blocks.encode(np.ascontiguousarray(plane), 8, "zstd") for plane in planes]
    return bytes([_PLANES]) + b"".join(coded)


def _from_planes(raw: memoryview, form: Form) -> tuple[np.ndarray, int]:
    found, at = np.empty((math.prod(form.shape), form.dtype.itemsize), np.uint8), 0
    for j in range(form.dtype.itemsize):
        found[:, j], used = blocks.decode(raw[at:], len(found), 8)
        at += used
    return _typed(found.reshape(-1), form.dtype), at


def _unsigned(part: np.ndarray) -> np.ndarray:
    """Integers as uint64; signed ones in the order 0, -1, 1, -2, ..."""
    flat = part.reshape(-1)
    if flat.dtype.kind == "u":
        return flat.astype(np.uint64)
    wide = flat.astype(np.int64)
    return (wide << 1).view(np.uint64) ^ (wide >> 63).view(np.uint64)


def _from_integers(raw: memoryview, form: Form) -> tuple[np.ndarray, int]:
    return _integers(*integers.decode(raw, math.prod(form.shape)), form)


def _from_rice(raw: memoryview, form: Form) -> tuple[np.ndarray, int]:
    return _integers(*integers.decode_rice(raw, math.prod(form.shape)), form)


def _integers(values: np.ndarray, used: int, form: Form) -> tuple[np.ndarray, int]:
    if form.dtype.kind not in "iu":
        raise ValueError(f"integers of {form.dtype}")
    if form.dtype.kind == "i":
        odd = (values & np.uint64(1)).view(np.int64)
        values = (values >> np.uint64(1)).view(np.int64) ^ -odd
    return values.astype(form.dtype), used


def _rice(values: np.ndarray, others: list[bytes]) -> list[bytes]:
    if integers.rice_bytes(values) >= min(map(len, others)):
        return []
    return [bytes([_RICE]) + integers.encode_rice(values)]


def _middle(bits: int, signed: bool) -> np.uint8:
    """Turns two's complement into the order of numbers, so that frequencies are smooth."""
    return np.uint8(1 << (bits - 1) if signed and bits > 1 else 0)


_READERS = {
    _STORED: _from_stored,
    _CODES: _from_codes,
    _PACKED: _from_packed,
    _PLANES: _from_planes,
    _INTEGERS: _from_integers,
    _RICE: _from_rice,
    _POSITIONS: _from_positions,
    _MASK: _from_mask,
    _KEPT: _from_kept,
}
