"""The basis of each axis of a value, and how operations on axes change it."""

import dataclasses
from typing import NamedTuple, TypeAlias

from jaxopt_compress.rewriting.axes import shape_of
from jaxopt_compress.rewriting.sources import ELEMENTWISE
from jaxopt_compress.rewriting.staging import Step

ZERO: str = "zero"


class Leaf(NamedTuple):
    """A parameter, moved and broadcast: its axis for each axis of the value, or None."""

    leaf: int
    axes: tuple[int | None, ...]


class Vector(NamedTuple):
    """A parameter's axis along ``at`` of the value, times what is the same along that."""

    leaf: int
    at: int
    axis: int


class Flat(NamedTuple):
    """A value that no rotation changes, the same along some axes."""

    axes: frozenset[int]


class Stream(NamedTuple):
    """A value whose ``axis`` is in the basis of a group.

    Attributes:
        group: The number of the group, before unions.
        axis: The axis of channels.
        scale: The parameter that has multiplied the channels, or None.
        square: Whether it is the square of such a value.
    """

    group: int
    axis: int
    scale: int | None = None
    square: bool = False


Info: TypeAlias = Leaf | Vector | Flat | Stream | str | None
"""What is known of a value: `ZERO`, or one of the above; None where nothing is."""


class Met(NamedTuple):
    """An axis of a parameter that an equation takes for the channels of a group.

    ``scale`` is the parameter that has multiplied the channels before, or None.
    """

    axis: int
    group: int
    scale: int | None = None


class Use(NamedTuple):
    """An equation that meets a parameter: the axes in a group's basis, and the line."""

    met: tuple[Met, ...]
    line: str


class Turn(NamedTuple):
    """A step that multiplies channels in the original basis: of a group, along an axis."""

    group: int
    axis: int


@dataclasses.dataclass
class Group:
    """Channels that go together: how many, and why they cannot be rotated, or None."""

    size: int
    reason: str | None = None


class Refused(Exception):
    """An equation does not keep the streams that it meets; says why."""


def as_vector(info: Info, shape: tuple[int, ...]) -> Vector | None:
    """A parameter that varies along a single axis of the value."""
    if isinstance(info, Vector):
        return info
    long = [k for k, n in enumerate(shape) if n > 1]
    if not isinstance(info, Leaf) or len(long) != 1:
        varying = [k for k in long if isinstance(info, Leaf) and info.axes[k] is not None]
        long = varying
    if not isinstance(info, Leaf) or len(long) != 1 or info.axes[long[0]] is None:
        return None
    return Vector(info.leaf, long[0], info.axes[long[0]])  # pyright: ignore


def constant(step: Step, infos: list[Info], k: int) -> frozenset[int]:
    """The axes of the result along which operand ``k`` has a single value."""
    shape, info = shape_of(step, k), infos[k]
    if not shape or info is ZERO:
        return frozenset(range(len(step.out.shape)))
    ones = frozenset(d for d, n in enumerate(shape) if n == 1)
    return ones | info.axes if isinstance(info, Flat) else ones


def flat(step: Step, infos: list[Info]) -> Flat | None:
    """What an elementwise operation leaves the same."""
    if step.eqn.primitive.name not in ELEMENTWISE:
        return None
    axes = frozenset(range(len(step.out.shape)))
    return Flat(axes.intersection(*(constant(step, infos, k) for k in range(len(infos)))))


def moved_info(info: Info, axes: list[int | None], step: Step) -> Info:
    """The info of a value whose axes were moved."""
    if info is ZERO:
        return info
    if isinstance(info, Leaf):
        return Leaf(info.leaf, tuple(None if i is None else info.axes[i] for i in axes))
    if isinstance(info, Vector):
        if info.at not in axes:
            raise Refused(f"{step.eqn.primitive.name} does not keep its axis")
        return info._replace(at=axes.index(info.at))
    if isinstance(info, Stream):
        if info.axis not in axes:
            raise Refused(f"{step.eqn.primitive.name} does not keep its axis of channels")
        return info._replace(axis=axes.index(info.axis))
    old = info.axes if isinstance(info, Flat) else frozenset()
    new = step.eqn.primitive.name == "broadcast_in_dim"
    return Flat(frozenset(k for k, i in enumerate(axes) if (new if i is None else i in old)))


def summed(stream: Stream, step: Step) -> Stream | None:
    """A sum over channels of squares does not depend on the basis."""
    axes = step.eqn.params["axes"]
    if stream.axis in axes:
        if stream.square and stream.scale is None:
            return None
        raise Refused("a mean over its channels, as of a layer norm, depends on the basis:")
    if stream.square:
        raise Refused("its squares are summed over other axes than its channels")
    return stream._replace(axis=stream.axis - sum(d < stream.axis for d in axes))


def entry(info: Info) -> Info:
    """One entry of a scanned operand."""
    if isinstance(info, Leaf):
        return Leaf(info.leaf, info.axes[1:])
    if isinstance(info, Stream) and info.axis > 0:
        return info._replace(axis=info.axis - 1)
    if isinstance(info, Flat):
        return Flat(frozenset(d - 1 for d in info.axes if d))
    return info if info is ZERO else None


def stacked(info: Info) -> Info:
    """All entries of a scanned result."""
    return info._replace(axis=info.axis + 1) if isinstance(info, Stream) else None
