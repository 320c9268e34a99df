"""Frequency tables of integers, described in few bytes.

A table gives each symbol of a range a level: eight times the logarithm of its frequency. Levels
are written for every symbol, or for every 2nd, 4th, ... of them, with straight lines between. So a
table of 256 symbols may take 20 bytes, where a small leaf has no more to give. The most frequent
symbol has a level of its own, since pruned weights put one peak into an otherwise smooth shape.
Bytes of a mask have one level per number of ones in them. Frequencies follow from levels by integer
arithmetic alone, so every machine has the same.
"""

import functools
from typing import NamedTuple

import numpy as np

# 2**(i / 8) in units of 1/256.
_EIGHTHS = np.array([256, 279, 304, 332, 362, 395, 431, 470], np.int64)
# The level of a frequency of one.
_UNIT = 48
# Strides 2**0 to 2**6, and after them levels by the number of ones in a byte.
_STRIDES, _BY_ONES = 7, 7
_ONES = np.array([i.bit_count() for i in range(256)])


class Table(NamedTuple):
    """A frequency for each symbol of a range.

    Attributes:
        low: The first symbol.
        weights: Frequencies of the symbols from ``low`` on, int64, some of them may be 0.
        raw: The bytes that describe it.
    """

    low: int
    weights: np.ndarray
    raw: bytes


def fit(counts: np.ndarray) -> Table:
    """The table by which symbols of these counts take the fewest bytes, its own included.

    Args:
        counts: How often each symbol is there, int64, at most 256 of them; two or more are not 0.

    Example:
        >>> import numpy as np
        >>> table = fit(np.array([0, 8, 16, 0]))
        >>> table.low, table.weights.tolist(), len(table.raw)
        (1, [131072, 262144], 7)
    """
    present = np.flatnonzero(counts)
    low, high = int(present[0]), int(present[-1])
    own = counts[low : high + 1].astype(np.int64)
    tables = []
    for shift in range(_STRIDES):
        if shift and (high - low) >> shift < 2:
            break
        tables.append(read(_describe(low, own, shift))[0])
    if high - low > 15:
        tables.append(read(_describe_ones(counts))[0])
    return min(tables, key=lambda table: cost(counts, table))


def cost(counts: np.ndarray, table: Table) -> float:
    """Bytes of symbols of these counts by an ideal coder, and of the table."""
    own = counts[table.low : table.low + len(table.weights)]
    least = table.weights.sum() * 2.0**-24
    share = np.maximum(table.weights, least) / table.weights.sum()
    return float(-(own * np.log2(share)).sum() / 8 + len(table.raw))


def read(raw: bytes | memoryview) -> tuple[Table, int]:
    """A table from the bytes that begin with its description, and how many of them these are.

    Raises:
        ValueError: There is no table.
    """
    if len(raw) < 5 or raw[2] > _BY_ONES:
        raise ValueError("it has no table of frequencies")
    low, span, shift, top, peak = raw[:5]
    knots = 9 if shift == _BY_ONES else _knots(span, shift)
    size = 5 + knots
    if low + span > 255 or not 1 <= span or top > span or len(raw) < size:
        raise ValueError("its table of frequencies is cut off")
    levels = np.frombuffer(raw[5:size], np.uint8).astype(np.int64)
    at = np.arange(span + 1)
    if shift == _BY_ONES:
        between = levels[_ONES[low + at]]
    else:
        left, rest = at >> shift, at & ((1 << shift) - 1)
        right = np.minimum(left + 1, knots - 1)
        between = (levels[left] * ((1 << shift) - rest) + levels[right] * rest) >> shift
    between[top] = peak
    weights = np.where(between > 0, _EIGHTHS[between & 7] << (between >> 3), 0)
    if np.count_nonzero(weights) < 1:
        raise ValueError("its table of frequencies is empty")
    return Table(low, weights, bytes(raw[:size])), size


def _describe(low: int, counts: np.ndarray, shift: int) -> bytes:
    span, top = len(counts) - 1, int(counts.argmax())
    peak = _levels(counts[top : top + 1].astype(float))
    smooth = counts.astype(float)
    if shift:
        near = smooth[max(top - 1, 0) : top + 2].sum() - smooth[top]
        smooth[top] = near / max(len(counts[max(top - 1, 0) : top + 2]) - 1, 1)
        smooth = np.array(
            [_mean_around(smooth, i << shift, shift) for i in range(_knots(span, shift))]
        )
    levels = _levels(smooth)
    if shift:
        levels = np.maximum(levels, 1)
    return bytes([low, span, shift, top, *peak]) + levels.tobytes()


def _describe_ones(counts: np.ndarray) -> bytes:
    full = np.zeros(256, np.int64)
    full[: len(counts)] = counts
    top = int(full.argmax())
    rest = np.where(np.arange(256) == top, 0, full)
    sizes = np.bincount(_ONES) - (np.arange(9) == _ONES[top])
    means = np.bincount(_ONES, rest) / np.maximum(sizes, 1)
    levels = np.maximum(_levels(means), 1)
    return bytes([0, 255, _BY_ONES, top, *_levels(full[top : top + 1])]) + levels.tobytes()


def _mean_around(x: np.ndarray, at: int, shift: int) -> float:
    half = 1 << (shift - 1)
    part = x[max(at - half, 0) : at + half + 1]
    return float(part.mean()) if len(part) else 0.0


def _levels(weights: np.ndarray) -> np.ndarray:
    """Levels of frequencies in uint8; 0 stands for a frequency of 0."""
    found = np.rint(8 * np.log2(np.maximum(weights, 2.0**-5))) + _UNIT
    return np.where(weights > 0, np.clip(found, 1, 255), 0).astype(np.uint8)


@functools.cache
def _knots(span: int, shift: int) -> int:
    """How many levels describe a range of ``span + 1`` symbols."""
    return (span >> shift) + 1 + bool(span & ((1 << shift) - 1))
