"""Checksums of the parts of an array, each computed by a process that holds the whole part."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxopt_compress.typing import Leaf

# Where a part begins along each axis, and how long it is.
Box = tuple[tuple[int, ...], tuple[int, ...]]


class Part(NamedTuple):
    """A part of a stored array.

    Attributes:
        start: Where it begins, along each axis.
        shape: How long it is, along each axis.
        crc32: The CRC-32 of its entries in row-major order, in little-endian bytes.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    crc32: int


def boxes_of(x: Leaf) -> list[Box]:
    """The parts that an array is saved in: the shards of all processes, each of them once."""
    if not isinstance(x, jax.Array):
        return [((0,) * x.ndim, x.shape)]
    indices = x.sharding.devices_indices_map(x.shape).values()
    return sorted({box_of(index, x.shape) for index in indices})


def own_sums(x: Leaf, boxes: Sequence[Box]) -> np.ndarray:
    """The checksum of each box of which this process has the first copy; 0 for others.

    Returns:
        uint32, so that the sum over processes has all of them.
    """
    sums = np.zeros(len(boxes), np.uint32)
    for i, data in own_parts(x, boxes):
        sums[i] = crc32(data)
    return sums


def own_parts(x: Leaf, boxes: Sequence[Box]) -> Iterator[tuple[int, np.ndarray]]:
    """The boxes of which this process has the first copy, by their number, and what is in them."""
    if not isinstance(x, jax.Array):
        if jax.process_index() == 0:
            yield 0, x
        return
    place = {box: i for i, box in enumerate(boxes)}
    shards = [(place[box_of(s.index, x.shape)], s) for s in x.addressable_shards]
    for i, shard in sorted(shards, key=lambda pair: pair[0]):
        if shard.replica_id == 0:
            yield i, np.asarray(shard.data)


def parts_in(parts: Sequence[Part], box: Box) -> list[tuple[int, tuple[slice, ...]]]:
    """The parts inside of a box, by their number, and where in the box they are."""
    start, shape = box
    inside = [i for i, part in enumerate(parts) if _is_inside(part, start, shape)]
    return [(i, _slices(parts[i], start)) for i in inside]


def verify(x: Leaf, parts: Sequence[Part]) -> None:
    """Raises ValueError unless the parts that this process holds of ``x`` are what was saved.

    Args:
        x: An array of NumPy, or one of JAX of whose shards each holds whole parts.
        parts: All parts.
    """
    for (start, shape), data in _held(x):
        for part in parts:
            if _is_inside(part, start, shape):
                _verify_part(data[_slices(part, start)], part)


def _verify_part(data: np.ndarray, part: Part) -> None:
    if crc32(data) != part.crc32:
        raise ValueError(
            f"its part of shape {list(part.shape)} from {list(part.start)} on is not what was "
            "saved, by its checksum"
        )


def holds_whole_parts(boxes: Iterable[Box], parts: Sequence[Part]) -> bool:
    """Whether each part lies inside of each box that it meets."""
    return all(
        _is_inside(part, start, shape) or not _meets(part, start, shape)
        for start, shape in boxes
        for part in parts
    )


def are_whole(parts: Sequence[Part], shape: tuple[int, ...]) -> bool:
    """Whether parts are the cells of a grid that fills an array."""
    cells = 1
    for axis, length in enumerate(shape):
        if any(len(part.start) != len(shape) or len(part.shape) != len(shape) for part in parts):
            return False
        intervals = sorted({(part.start[axis], part.shape[axis]) for part in parts})
        ends = [0, *(start + size for start, size in intervals)]
        if ends[:-1] != [start for start, _ in intervals] or ends[-1] != length:
            return False
        cells *= len(intervals)
    return len(parts) == len({part.start for part in parts}) == cells


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """The box of an index of slices."""
    ends = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    return tuple(start for start, _ in ends), tuple(stop - start for start, stop in ends)


def crc32(x: np.ndarray) -> int:
    """The checksum of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


def _held(x: Leaf) -> Iterator[tuple[Box, np.ndarray]]:
    """The distinct parts of ``x`` in this process."""
    if not isinstance(x, jax.Array):
        yield ((0,) * x.ndim, x.shape), x
        return
    shards = {box_of(shard.index, x.shape): shard for shard in x.addressable_shards}
    for box, shard in shards.items():
        yield box, np.asarray(shard.data)


def _slices(part: Part, start: tuple[int, ...]) -> tuple[slice, ...]:
    begins = [a - b for a, b in zip(part.start, start, strict=True)]
    return tuple(slice(a, a + n) for a, n in zip(begins, part.shape, strict=True))


def _is_inside(part: Part, start: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    axes = zip(part.start, part.shape, start, shape, strict=True)
    return all(b <= a and a + n <= b + m for a, n, b, m in axes)


def _meets(part: Part, start: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    axes = zip(part.start, part.shape, start, shape, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in axes)
