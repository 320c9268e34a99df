"""A dense parameter that remembers, through views and arithmetic, which axis is which."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxopt_compress.arrays import CompressedArray
from jaxopt_compress.typing import Value


class Axis(NamedTuple):
    """The part of a parameter that one axis of a probe holds.

    Attributes:
        names: The negative axes of the parameter that make it up; none if it is new.
        start: Where the parameter's part begins, in a concatenation.
        size: How long that part is; None for all of the axis.
        index: Which entry of the parameter's axis it is, if it is known to be one of them.
        turned: Whether the entries come in the opposite order.
    """

    names: tuple[int, ...] = ()
    start: int = 0
    size: int | None = None
    index: int | None = None
    turned: bool = False


Axes = tuple[Axis, ...]


class Member(NamedTuple):
    """One parameter inside a probe.

    Attributes:
        path: Its path.
        shape: Its shape.
        axes: What each axis of the probe holds of it.
        taken: ``(axis, index)`` of its axes of which the probe has one known entry.
        looked_up: Its axes of which the probe has entries that depend on data.
        summed: Its axes over which it was reduced.
        mixed: Whether arrays other than parameters were added to it, or multiplied with it.
    """

    path: str
    shape: tuple[int, ...]
    axes: Axes
    taken: tuple[tuple[int, int], ...] = ()
    looked_up: tuple[int, ...] = ()
    summed: tuple[int, ...] = ()
    mixed: bool = False


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["value", "entries"], meta_fields=["members"]
)
@dataclasses.dataclass(frozen=True)
class Probe(CompressedArray):
    """A dense array made of one or more parameters.

    Attributes:
        value: The array.
        members: What it holds of each parameter.
        entries: int32 of its shape, which entry of the axes that were looked up each element is
            from; row-major where several were. None if none was, or of several members.
    """

    value: Value
    members: tuple[Member, ...]
    entries: Value = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> np.dtype:  # pyright: ignore
        """The dtype of the array."""
        return self.value.dtype

    def materialize(self) -> jax.Array:
        """The array itself."""
        return self.value

    def specs(self, spec: PartitionSpec) -> "Probe":
        """The spec of the array, in a probe."""
        return self.replace(value=spec, entries=None if self.entries is None else spec)

    def axes_of(self, member: Member) -> Axes:
        """The axes of ``member``, without the leading ones that loops have stripped."""
        return member.axes[len(member.axes) - len(self.value.shape) :]

    def stripped(self, member: Member) -> Axes:
        """The leading axes of ``member`` that loops have stripped."""
        return member.axes[: len(member.axes) - len(self.value.shape)]

    def relabel(
        self, value: Value, fn: Callable[[Axes], Sequence[Axis]], entries: Value = None
    ) -> "Probe":
        """A view of this probe: ``fn(axes)`` gives the axes of ``value``."""
        moved = (m._replace(axes=(*self.stripped(m), *fn(self.axes_of(m)))) for m in self.members)
        return Probe(value, tuple(moved), entries)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all members."""
        return tuple(m.path for m in self.members)


def probe(path: str, value: Value) -> Probe:
    """A probe of a whole parameter."""
    shape = tuple(value.shape)
    return Probe(value, (Member(path, shape, tuple(Axis((d,)) for d in range(-len(shape), 0))),))
