"""Few codes that are not the most frequent one, told one by one by models that are mixed.

Whether a code differs from the most frequent one is asked where its row and its column hold such
codes at all, which is told first. Its row, its column and its neighbours each say a probability
from the answers so far; their log-odds are added with weights that follow the errors, as in the
coders of the PAQ family. So the answer to each question changes the next: this is for arrays of
which there is little to tell, such as the masks of pruned weights, and takes some microseconds per
question.

Sums, products and quotients of float64 are the same on every machine, and logarithms come from
tables of integers that `decimal` computes, which rounds correctly.

References:
    Mahoney, 2005, Adaptive Weighing of Context Models for Lossless Data Compression.
"""

import decimal
import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxopt_compress.extras import require

# Questions that are worth their time, and parts of a probability and of log-odds in tables.
_MOST, _PARTS, _ODDS = 300_000, 2**12, 2**6
_LIMIT = 11 * _ODDS
# By trial: what a context weighs at first, how fast weights learn, answers that the probability of
# all stands for in a context, and after how many answers old ones count half.
_WEIGHT, _RATE, _PRIOR, _HALVE = 0.5, 0.02, 6.0, 400.0
# Magnitudes are told in unary up to here, then in eight bits.
_UNARY = 24

# Takes an answer, or None where it is read, and the probability of a yes; gives the answer.
_Tell = Callable[[int | None, float], int]


def encode(symbols: np.ndarray, bits: int, columns: int) -> bytes | None:
    """Codes symbols, uint8 of rank 1, in rows of ``columns``; None where it would take long."""
    mode = int(np.argmax(np.bincount(symbols, minlength=256)))
    values = _rows(symbols.astype(np.int64) - mode, columns)
    there = values != 0
    live = int(there.any(1).sum()) * int(there.any(0).sum())
    if live + int(np.abs(values).clip(0, _UNARY).sum()) + sum(values.shape) > _MOST:
        return None
    stream = require("constriction", extra="coding").stream
    answers: list[int] = []
    chances: list[float] = []

    def tell(answer: Any, chance: float) -> int:
        answers.append(answer)
        chances.append(chance)
        return answer

    _walk(values.tolist(), _other(mode, bits), tell, known=True)
    coder = stream.queue.RangeEncoder()
    family = stream.model.Bernoulli(perfect=False)
    coder.encode(np.array(answers, np.int32), family, np.array(chances, np.float32))
    return bytes([mode]) + coder.get_compressed().astype("<u4").tobytes()


def decode(payload: memoryview, count: int, bits: int, columns: int) -> np.ndarray:
    """Inverts `encode`."""
    if len(payload) % 4 != 1:
        raise ValueError(f"{len(payload)} bytes of words of 4 and one more")
    stream = require("constriction", extra="coding").stream
    coder = stream.queue.RangeDecoder(np.frombuffer(payload[1:], "<u4").astype(np.uint32))
    family = stream.model.Bernoulli(perfect=False)
    chance_of = np.empty(1, np.float32)

    def tell(_: int | None, chance: float) -> int:
        chance_of[0] = chance
        try:
            return int(coder.decode(family, chance_of)[0])
        except AssertionError as error:
            raise ValueError("no numbers were coded as these words") from error

    values = _rows(np.zeros(count, np.int64), columns)
    found = _walk(values.tolist(), _other(payload[0], bits), tell, known=False)
    symbols = np.array(found, np.int64).reshape(-1)[:count] + payload[0]
    if symbols.size and not 0 <= symbols.min() <= symbols.max() < 1 << bits:
        raise ValueError(f"symbols from {symbols.min()} to {symbols.max()} of {bits} bits")
    return symbols.astype(np.uint8)


def _rows(values: np.ndarray, columns: int) -> np.ndarray:
    columns = max(columns, 1)
    return np.append(values, np.zeros(-len(values) % columns, np.int64)).reshape(-1, columns)


def _other(mode: int, bits: int) -> int | None:
    """The only value that is not 0, if there are two symbols."""
    return 1 - 2 * (mode & 1) if bits == 1 else None


def _walk(rows: list[list[int]], other: int | None, tell: _Tell, known: bool) -> list[list[int]]:
    """Tells all values, or fills them in."""
    high, wide = len(rows), len(rows[0]) if rows else 0
    some = [any(row) for row in rows] if known else [None] * high
    flags = _flags(some, tell)
    used = [False] * wide
    for row in rows if known else ():
        for j, v in enumerate(row):
            used[j] = used[j] or v != 0
    live = [j for j, f in enumerate(_flags(used if known else [None] * wide, tell)) if f]
    there, value = _Mixed(4, tell), _Value(tell)
    before = older = [0] * wide
    for i, row in enumerate(rows):
        left = 0
        for j in live if flags[i] else ():
            v, up = row[j], before[j]
            sizes = (min(abs(left), 3), min(abs(up), 3), older[j] != 0)
            if there.ask((v != 0) if known else None, (i, j, sizes, (j, up != 0))):
                near = (left + up, min(abs(left) + abs(up), 9))
                v = value.ask(v if known else None, i, j, near) if other is None else other
                row[j] = v
            left = v
        before, older = row, before
    return rows


def _flags(answers: Sequence[int | bool | None], tell: _Tell) -> list[int]:
    """Which rows, or columns, hold anything; neighbours are alike."""
    mixed, found, last = _Mixed(2, tell), [], 1
    older = 1
    for answer in answers:
        found.append(mixed.ask(answer, (last, (last, older))))
        older, last = last, found[-1]
    return found


class _Mixed:
    """A question whose answers are counted in all, and in several contexts."""

    def __init__(self, contexts: int, tell: _Tell):
        self.tell = tell
        self.all = [1.0, 2.0]
        self.counts: list[dict[Hashable, list[float]]] = [{} for _ in range(contexts)]
        self.weights = [_WEIGHT] * contexts

    def ask(self, answer: int | bool | None, keys: Iterable[Hashable]) -> int:
        """Tells or reads the answer, and learns from it."""
        stretch, squash = _tables()
        share = self.all[0] / self.all[1]
        base = stretch[int(share * _PARTS)]
        own, beyond, total = [], [], float(base)
        for counts, key, weight in zip(self.counts, keys, self.weights, strict=True):
            seen = counts.get(key)
            if seen is None:
                seen = counts[key] = [0.0, 0.0]
            chance = (seen[0] + _PRIOR * share) / (seen[1] + _PRIOR)
            further = stretch[int(chance * _PARTS)] - base
            total += weight * further
            own.append(seen)
            beyond.append(further)
        chance = squash[min(max(int(total), -_LIMIT), _LIMIT) + _LIMIT]
        found = self.tell(None if answer is None else int(answer), chance)
        step = _RATE / _ODDS * (found - chance)
        for i, further in enumerate(beyond):
            self.weights[i] += step * further
        for seen in (self.all, *own):
            seen[0] += found
            seen[1] += 1.0
            if seen[1] > _HALVE:
                seen[0] *= 0.5
                seen[1] *= 0.5
        return found


class _Value:
    """A value that is not 0: its sign, and its magnitude in unary."""

    def __init__(self, tell: _Tell):
        self.tell = tell
        self.sign, self.size = _Mixed(2, tell), _Mixed(4, tell)

    def ask(self, value: int | None, row: int, column: int, near: tuple[int, int]) -> int:
        """Tells or reads the value; ``near`` are the sum of its neighbours, and of their sizes."""
        side = (near[0] > 0) - (near[0] < 0)
        size, k = (None if value is None else abs(value)), 1
        positive = self.sign.ask(None if value is None else value > 0, (column, side))
        answer = lambda: None if size is None else size > k
        keys = lambda: ((column, min(k, 8)), (row, min(k, 8)), (near[1], min(k, 8)), k)
        longer = lambda: self.size.ask(answer(), keys())
        while k < _UNARY and longer():
            k += 1
        if k == _UNARY:
            rest = None if size is None else size - k
            bits = (self.tell(None if rest is None else rest >> b & 1, 0.5) << b for b in range(8))
            k += sum(bits)
        return k if positive else -k


@functools.cache
def _tables() -> tuple[list[int], list[float]]:
    """Log-odds of probabilities, in parts of `_ODDS`, and probabilities of log-odds."""
    with decimal.localcontext(decimal.Context(prec=28)):
        half = decimal.Decimal(1) / 2
        log_odds = lambda i: ((i + half) / (_PARTS - i - half)).ln() * _ODDS
        stretch = [int(log_odds(i).to_integral_value()) for i in range(_PARTS)]
        chance = lambda k: 1 / (1 + (-decimal.Decimal(k) / _ODDS).exp())
        squash = [int(chance(k) * 2**22) / 2**22 for k in range(-_LIMIT, _LIMIT + 1)]
    return [*stretch, stretch[-1]], [min(max(p, 2.0**-16), 1 - 2.0**-16) for p in squash]
