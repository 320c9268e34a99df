"""What a value of a function is to the channels that products share."""

import dataclasses
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

ZERO: str = "zero"


class Leaf(NamedTuple):
    """A parameter, moved and broadcast: its axis for each axis of the value, or None.

    ``stack`` are the parameter's axes that scans run over.
    """

    leaf: int
    axes: tuple[int | None, ...]
    stack: tuple[int, ...] = ()


class Derived(NamedTuple):
    """A value computed from parameters only."""

    leaves: frozenset[int]


class Channels(NamedTuple):
    """A value that is divided by the scales of ``group`` along ``axis``.

    Index ``i`` of the axis belongs to channel ``i // every % size``; ``every`` is 1 but where a
    reshape merged the axis with others. ``plain`` says that the value is the product's result, plus
    biases.
    """

    group: int
    axis: int
    every: int = 1
    plain: bool = True


class Blocked(NamedTuple):
    """A value with channels that cannot be scaled, and why."""

    reason: str


Info: TypeAlias = Leaf | Derived | Channels | Blocked | str | None
"""What is known of a value: `ZERO`, or one of the above; None where nothing is."""


class Member(NamedTuple):
    """An axis of a parameter that belongs to channels, as in `Channels`.

    ``stack`` are the parameter's axes that scans run over: each of their entries has channels of
    its own.
    """

    leaf: int
    axis: int
    every: int = 1
    stack: tuple[int, ...] = ()


@dataclasses.dataclass
class Group:
    """The channels of one product's result, and the parameters that belong to them.

    Attributes:
        size: The number of channels.
        writer: The weight of the product; or a parameter that multiplies the channels.
        biases: What is scaled along with its result, by whichever operation it joins.
        direct: The biases that are added to the result itself.
        readers: The weights of the products that contract it.
        reason: Why it cannot be scaled; None if it can.
    """

    size: int
    writer: Member
    biases: list[Member] = dataclasses.field(default_factory=list)
    direct: list[Member] = dataclasses.field(default_factory=list)
    readers: list[Member] = dataclasses.field(default_factory=list)
    reason: str | None = None

    def block(self, reason: str) -> None:
        """Keeps the first reason."""
        self.reason = self.reason or reason


def entry(info: Info) -> Info:
    """One entry of a scanned operand; None if nothing is known of it."""
    if isinstance(info, Leaf):
        if info.axes[0] is None:
            return None
        return Leaf(info.leaf, info.axes[1:], (*info.stack, info.axes[0]))
    return info if info is ZERO or isinstance(info, Derived) else None


def of_channels(x: np.ndarray, member: Member, size: int, shape: tuple[int, ...]) -> np.ndarray:
    """An array beside a parameter as ``[*stack, times, size, every]``.

    Args:
        x: An array of the parameter's rank, of size 1 along all axes that are not the member's.
        member: The axes.
        size: The number of channels.
        shape: The parameter's shape.
    """
    kept = (*member.stack, member.axis)
    x = np.broadcast_to(x, [shape[d] if d in kept else 1 for d in range(x.ndim)])
    x = np.transpose(x, (*kept, *(d for d in range(x.ndim) if d not in kept)))
    return x.reshape(*(shape[d] for d in member.stack), -1, size, member.every)


def beside(x: np.ndarray, member: Member, shape: tuple[int, ...]) -> jax.Array:
    """Values ``[*stack, size]`` of channels, of a rank and sizes that broadcast to ``shape``."""
    times = shape[member.axis] // (x.shape[-1] * member.every)
    full = np.tile(np.repeat(x, member.every, -1), times)
    order = (*member.stack, member.axis)
    full = full.transpose(np.argsort(order))
    return jnp.asarray(full.reshape([shape[d] if d in order else 1 for d in range(len(shape))]))
