"""Codes by an adaptive binary model that knows how large their neighbours are.

As in DeepCABAC, a code is told in yes-or-no questions (is it zero, its sign, the length of its
magnitude, the bits of that), each with a probability that adapts to the answers so far. The context
of a code is the size to expect: the mean magnitude of its column so far, times that of its
row so far, over the mean of all. Scales per channel leave such differences between rows and
columns, and pruning leaves larger ones.

Many codes are told at once, so that NumPy does the work: a segment of one row in each of several
bands of rows. Contexts depend on what was told before, probabilities on counts; both are computed
in integers, so every machine has the same.

References:
    Wiedemann et al., 2020, DeepCABAC: A Universal Compression Algorithm for Deep Neural Networks.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxopt_compress.extras import require

# Contexts: an expected size up to each of these, in 1/16; steps of half an octave and below.
_EDGES = np.array([1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 1024])
_CONTEXTS = len(_EDGES) + 1
# Questions: zero, sign, longer than k bits, and three bits below the first for each length.
_ZERO, _SIGN, _LONGER, _BITS = 0, 1, 2, 11
_NODES = _BITS + 9 * 8
_MODELED = 3
# Weight of the answers in all contexts beside those in one, and of the entries before a row.
_COMMON, _BEFORE = 16, 4
_MOST = 256
_ONE = 2**20
# Questions without a model are even.
_EVEN = -1

# Takes bits, or None where they are read, and the probabilities of a one; gives the bits.
_Tell = Callable[[np.ndarray | None, np.ndarray], np.ndarray]


def encode(symbols: np.ndarray, columns: int) -> bytes:
    """Codes symbols, uint8 of rank 1, in rows of ``columns``; the last may be shorter."""
    middle = int(np.rint(symbols.mean()))
    values = _rows(symbols.astype(np.int64) - middle, columns)
    stream = require("constriction", extra="coding").stream
    bits, chances = [], []

    def tell(answers: Any, chance: np.ndarray) -> np.ndarray:
        bits.append(answers.astype(np.int32))
        chances.append(chance)
        return answers

    _walk(values, len(symbols), tell, known=True)
    coder = stream.queue.RangeEncoder()
    coder.encode(
        np.concatenate(bits), stream.model.Bernoulli(perfect=False), np.concatenate(chances)
    )
    return bytes([middle]) + coder.get_compressed().astype("<u4").tobytes()


def decode(payload: memoryview, count: int, columns: int) -> np.ndarray:
    """Inverts `encode`."""
    if len(payload) % 4 != 1:
        raise ValueError(f"{len(payload)} bytes of words of 4 and one more")
    stream = require("constriction", extra="coding").stream
    coder = stream.queue.RangeDecoder(np.frombuffer(payload[1:], "<u4").astype(np.uint32))
    family = stream.model.Bernoulli(perfect=False)

    def tell(_: np.ndarray | None, chance: np.ndarray) -> np.ndarray:
        return coder.decode(family, chance).astype(bool) if len(chance) else np.zeros(0, bool)

    values = _rows(np.zeros(count, np.int64), columns)
    _walk(values, count, tell, known=False)
    return (values.reshape(-1)[:count] + payload[0]).astype(np.uint8)


def _rows(values: np.ndarray, columns: int) -> np.ndarray:
    missing = -len(values) % columns
    return np.append(values, np.zeros(missing, np.int64)).reshape(-1, columns)


def _walk(values: np.ndarray, count: int, tell: _Tell, known: bool) -> None:
    """Tells all values, or fills them in."""
    model, columns = _Model(tell), values.shape[1]
    sums, seen = np.zeros(columns, np.int64), np.zeros(columns, np.int64)
    total, told = 0, 0
    before: dict[int, int] = {}
    for rows, segments in _order(values.shape, count):
        row_sum = np.array([before.get(band, 0) for band in range(len(rows))], np.int64)
        row_seen = np.full(len(rows), _BEFORE)
        for own in segments:
            mean = (16 * total + 16) // (told + 16) if told else 16
            column = (16 * sums[own] + _BEFORE * mean) // (seen[own] + _BEFORE)
            row = (16 * row_sum + mean) // (row_seen + 1)
            expected = column[None, :] * row[:, None] // max(mean, 1)
            context = np.searchsorted(_EDGES, expected.reshape(-1))
            at = np.ix_(rows, np.arange(own.start, own.stop))
            part = model.tell(values[at].reshape(-1) if known else None, context)
            part = part.reshape(len(rows), -1)
            values[at] = part
            size = np.abs(part)
            sums[own] += size.sum(0)
            seen[own] += len(rows)
            row_sum += size.sum(1)
            row_seen += part.shape[1]
            total += int(size.sum())
            told += part.size
        for band in range(len(rows)):
            # What the next row begins with.
            before[band] = int(_BEFORE * row_sum[band] // row_seen[band])
        many = seen > _MOST
        sums[many] >>= 1
        seen[many] >>= 1


def _order(shape: tuple[int, int], count: int) -> Iterator[tuple[np.ndarray, list[slice]]]:
    """Which rows are told together, and in which segments of columns."""
    rows, columns = shape
    lanes = min(max(count // 512, 64), 8192)
    width = min(max(-(-columns // 4), 16), lanes, columns)
    segments = [slice(a, min(a + width, columns)) for a in range(0, columns, width)]
    bands = min(max(lanes // width, 1), rows)
    height = -(-rows // bands)
    for first in range(height):
        yield np.arange(first, rows, height), segments


class _Model:
    """Counts of answers, by context and question."""

    def __init__(self, answer: _Tell):
        self.answer = answer
        self.counts = np.zeros((_CONTEXTS * _NODES, 2), np.int64)
        self.common = np.zeros((_NODES, 2), np.int64)

    def tell(self, values: np.ndarray | None, context: np.ndarray) -> np.ndarray:
        """Tells a value for each context, or reads it; returns them."""
        size = None if values is None else np.abs(values)
        pick = lambda x, where: None if x is None else x[where]
        some = self.ask(_ZERO, context, None if size is None else size != 0)
        found = np.zeros(len(context), np.int64)
        at = np.flatnonzero(some)
        context, size = context[at], pick(size, at)
        negative = self.ask(_SIGN, context, None if values is None else values[at] < 0)
        length = np.ones(len(at), np.int64)
        left = np.arange(len(at))
        for k in range(1, 9):
            longer = self.ask(
                _LONGER + k, context[left], None if size is None else size[left] >> k != 0
            )
            left = left[longer]
            length[left] += 1
            if not len(left):
                break
        told = np.ones(len(at), np.int64)
        for i in range(8):
            left = np.flatnonzero(length > i + 1)
            if not len(left):
                break
            node = _BITS + (length[left] - 1) * 8 + told[left] if i < _MODELED else _EVEN
            place = length[left] - 2 - i
            bit = self.ask(
                node, context[left], None if size is None else (size[left] >> place & 1) != 0
            )
            told[left] = 2 * told[left] + bit
        found[at] = np.where(negative, -told, told)
        return found

    def ask(
        self, node: int | np.ndarray, context: np.ndarray, answers: np.ndarray | None
    ) -> np.ndarray:
        """Tells or reads the answers to one question each, and learns from them."""
        if node is _EVEN:
            return self.answer(answers, np.full(len(context), 0.5, np.float32))
        nodes = np.broadcast_to(np.asarray(node), context.shape)
        place = context * _NODES + nodes
        common = 2 * self.common[nodes] + 1
        prior = _COMMON * _ONE * common[:, 1] // common.sum(1)
        own = self.counts[place]
        chance = (own[:, 1] * _ONE + prior) // (own.sum(1) + _COMMON)
        chance = np.clip(chance, 16, _ONE - 16)
        found = self.answer(answers, (chance / _ONE).astype(np.float32))
        added = np.bincount(2 * place + found, minlength=self.counts.size)
        self.counts += added.reshape(-1, 2)
        self.common += added.reshape(_CONTEXTS, _NODES, 2).sum(0)
        return found
