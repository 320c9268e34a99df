"""Integers of any size as symbols of 8 bits and loose bits; gaps between the ones of a mask."""

import numpy as np

from jaxopt_compress.storage.coding import blocks

# Values below it are symbols of their own.
_OWN = 16
# Values whose loose bits are packed at a time, each taking some 30 bytes per bit in between.
_PIECE = 2**14
_LONGEST_UNARY = 2**26


def encode(values: np.ndarray, coding: str | None) -> bytes:
    """Codes integers: their size and their two bits below the first as symbols, the rest as it is.

    Args:
        values: uint64 of rank 1.
        coding: As in `blocks.encode`.
    """
    symbols, widths = _symbols(values)
    loose = pack_bits(values, widths)
    return blocks.encode(symbols, 8, coding) + loose


def decode(raw: memoryview, count: int, coding: str | None = None) -> tuple[np.ndarray, int]:
    """Inverts `encode`: uint64 values, and how many bytes held them."""
    del coding
    symbols, at = blocks.decode(raw, count, 8)
    sizes = (symbols.astype(np.int64) - _OWN) // 4 + 4
    large = symbols >= _OWN
    widths = np.where(large, sizes - 2, 0)
    heads = np.where(large, 4 | symbols & 3, symbols).astype(np.uint64)
    tails, used = unpack_bits(raw[at:], widths)
    return heads << widths.astype(np.uint64) | tails, at + used


def _symbols(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.zeros(values.shape, np.int64)
    rest = values.copy()
    for step in (32, 16, 8, 4, 2, 1):
        more = rest >> np.uint64(step) != 0
        sizes[more] += step
        rest[more] >>= np.uint64(step)
    large = values >= _OWN
    widths = np.where(large, sizes - 2, 0)
    below = values >> widths.astype(np.uint64) & np.uint64(3)
    symbols = np.where(
        large, _OWN + (sizes - 4) * 4 + below.astype(np.int64), values.astype(np.int64)
    )
    return symbols.astype(np.uint8), widths


def encode_rice(values: np.ndarray) -> bytes:
    """Golomb-Rice: the quotient by ``2**k`` in unary, the remainder in ``k`` bits.

    Args:
        values: uint64 of rank 1.
    """
    k = rice_parameter(values)
    tops = (values >> np.uint64(k)).astype(np.int64)
    ends = np.cumsum(tops + 1)
    unary = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    unary[ends - 1] = 1
    raw = np.packbits(unary, bitorder="little").tobytes()
    return bytes([k]) + blocks.varint(len(raw)) + raw + pack_bits(values, np.full(len(values), k))


def decode_rice(raw: memoryview, count: int) -> tuple[np.ndarray, int]:
    """Inverts `encode_rice`."""
    k = raw[0] if len(raw) else 64
    size, at = blocks.read_varint(raw, 1)
    if k > 63 or at + size > len(raw) or size > _LONGEST_UNARY:
        raise ValueError(f"gaps by {k} bits in {size} bytes")
    unary = np.unpackbits(np.frombuffer(raw[at : at + size], np.uint8), bitorder="little")
    ends = np.flatnonzero(unary)
    if len(ends) != count:
        raise ValueError(f"{len(ends)} gaps, not {count}")
    tops = (np.diff(ends, prepend=-1) - 1).astype(np.uint64)
    at += size
    tails, used = unpack_bits(raw[at:], np.full(count, k))
    return tops << np.uint64(k) | tails, at + used


def rice_parameter(values: np.ndarray) -> int:
    """The number of bits of remainders that takes the fewest bytes."""
    return min(range(40), key=lambda k: _rice_bits(values, k))


def rice_bytes(values: np.ndarray) -> int:
    """Bytes that `encode_rice` will take, up to a few."""
    return _rice_bits(values, rice_parameter(values)) // 8 + 4


def _rice_bits(values: np.ndarray, k: int) -> int:
    total = int((values >> np.uint64(k)).sum(dtype=np.float64)) + (k + 1) * len(values)
    return total if total < 8 * _LONGEST_UNARY else 2**62


def pack_bits(values: np.ndarray, widths: np.ndarray) -> bytes:
    """The low bits of each value, as many as its width, lowest first, one after the other.

    Each `_PIECE` of values begins with a whole byte.
    """
    out = []
    for start in range(0, len(values), _PIECE):
        own = widths[start : start + _PIECE]
        value = np.repeat(values[start : start + _PIECE], own)
        bits = value >> _places(own).astype(np.uint64) & np.uint64(1)
        out.append(np.packbits(bits.astype(np.uint8), bitorder="little").tobytes())
    return b"".join(out)


def unpack_bits(raw: memoryview, widths: np.ndarray) -> tuple[np.ndarray, int]:
    """Inverts `pack_bits`: uint64 values, and how many bytes held them."""
    values, at = np.zeros(len(widths), np.uint64), 0
    for start in range(0, len(widths), _PIECE):
        own = widths[start : start + _PIECE]
        total = int(own.sum())
        size = -(-total // 8)
        if at + size > len(raw):
            raise ValueError("it is cut off")
        words = np.frombuffer(raw[at : at + size], np.uint8)
        bits = np.unpackbits(words, bitorder="little")[:total].astype(np.uint64)
        ends = np.concatenate([[0], np.cumsum(own)])
        sums = np.concatenate(
            [np.zeros(1, np.uint64), np.cumsum(bits << _places(own).astype(np.uint64))]
        )
        # Sums may wrap around; their differences are right.
        values[start : start + _PIECE] = sums[ends[1:]] - sums[ends[:-1]]
        at += size
    return values, at


def _places(widths: np.ndarray) -> np.ndarray:
    """0, 1, ... up to each width."""
    starts = np.cumsum(widths) - widths
    return np.arange(int(widths.sum())) - np.repeat(starts, widths)
