"""Channels that products share: written by some weights and biases, read by others."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jax import numpy as jnp
from jax.extend import core

from jaxopt_compress.lift._compat import source_line
from jaxopt_compress.rewriting.axes import Product, merged, moved, pooled, product
from jaxopt_compress.rewriting.staging import Staged, Step

_LINEAR = {"neg", "abs"}
_SUMS = {"add", "add_any", "sub", "max", "min"}
_SIGNS = {"ge", "gt", "le", "lt", "eq", "ne"}


class Leaf(NamedTuple):
    """A parameter, moved and broadcast: its axis for each axis of the value, or None."""

    leaf: int
    axes: tuple[int | None, ...]


class Derived(NamedTuple):
    """A value computed from parameters only."""

    leaves: frozenset[int]


class Channels(NamedTuple):
    """A value that is divided by the scales of ``group`` along ``axis``.

    Index ``i`` of the axis belongs to channel ``i // every % size``; ``every`` is 1 but where a
    reshape merged the axis with others.
    """

    group: int
    axis: int
    every: int = 1


class Member(NamedTuple):
    """An axis of a parameter that belongs to channels, as in `Channels`."""

    leaf: int
    axis: int
    every: int = 1


_ZERO: Any = "zero"


@dataclasses.dataclass
class Group:
    """The channels of one product's result, and the parameters that belong to them.

    Attributes:
        size: The number of channels.
        writer: The weight of the product.
        biases: What is added to its result.
        readers: The weights of the products that contract it.
        reason: Why it cannot be scaled; None if it can.
    """

    size: int
    writer: Member
    biases: list[Member] = dataclasses.field(default_factory=list)
    readers: list[Member] = dataclasses.field(default_factory=list)
    reason: str | None = None

    def block(self, reason: str) -> None:
        """Keeps the first reason."""
        self.reason = self.reason or reason


class Walk:
    """Follows a function's equations once.

    Each value is either not changed by scaling or is divided by one group's scales along one
    axis. Where neither holds, the groups that reach it are blocked, with the reason.

    Attributes:
        groups: All channels found.
        skipped: Weight -> why its output channels have no group at all.
    """

    def __init__(self, staged: Staged, leaves: list[Any], names: list[str]):
        self.names = names
        self.groups: list[Group] = []
        self.skipped: dict[int, str] = {}
        self.dtypes = [x.dtype for x in leaves]
        self.used: dict[int, list[str]] = {i: [] for i in range(len(leaves))}
        self.infos: dict[int, Any] = {
            i: Leaf(i, tuple(range(len(x.shape)))) for i, x in enumerate(leaves)
        }
        for step in staged.steps:
            self._visit(step)
        for info in map(self._info, staged.outputs):
            if isinstance(info, Channels):
                self.groups[info.group].block("its result is a result of the function")
            self._use([info], "the function's result")
        for group in self.groups:
            self._settle(group)

    def _info(self, atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            return _ZERO if np.all(np.asarray(atom.val) == 0) else Derived(frozenset())
        info = self.infos.get(atom)
        # The scales of a blocked group are 1, so its values do not change.
        blocked = isinstance(info, Channels) and self.groups[info.group].reason
        return None if blocked else info

    def _use(self, infos: list[Any], line: str) -> None:
        for info in infos:
            if isinstance(info, Leaf):
                self.used[info.leaf].append(line)

    def _block(self, infos: list[Any], reason: str) -> None:
        for info in infos:
            if isinstance(info, Channels):
                self.groups[info.group].block(reason)

    def _visit(self, step: Step) -> None:
        infos = [self._info(x) for x in step.inputs]
        out = self._moved(step, infos)
        if out is not None:
            self.infos[step.outputs[0]] = out
            return
        line = source_line(step.eqn)
        self._use(infos, line)
        if step.eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            out = self._multiply(step, infos, line)
        elif any(isinstance(x, Channels) for x in infos):
            out = self._elementwise(step, infos)
            if isinstance(out, str):
                self._block(infos, f"{out} at {line}")
                out = None
        elif all(isinstance(x, Leaf | Derived) or x is _ZERO for x in infos):
            leaves = {x.leaf for x in infos if isinstance(x, Leaf)}
            out = Derived(
                frozenset(leaves).union(*(x.leaves for x in infos if isinstance(x, Derived)))
            )
        self._enclosed(step, infos, line)
        if out is not None:
            self.infos[step.outputs[0]] = out

    def _moved(self, step: Step, infos: list[Any]) -> Any:
        """The result's info if the equation only moves axes."""
        if len(infos) != 1:
            return None
        info = infos[0]
        if isinstance(info, Channels):
            axes = moved(step) or pooled(step)
            if axes is not None and info.axis in axes:
                return Channels(info.group, axes.index(info.axis), info.every)
            flat = merged(step, info.axis)
            return flat and Channels(info.group, flat[0], flat[1] * info.every)
        axes = moved(step) if isinstance(info, Leaf) or info is _ZERO else None
        if axes is None or info is _ZERO:
            return None if axes is None else _ZERO
        return Leaf(info.leaf, tuple(None if i is None else info.axes[i] for i in axes))

    def _elementwise(self, step: Step, infos: list[Any]) -> Any:
        """The channels of the result, None if scales do not change it, or what is wrong."""
        name = step.eqn.primitive.name
        data = {x for x in infos if isinstance(x, Channels)}
        first = next(x for x in infos if isinstance(x, Channels))
        if moved(step) is not None or pooled(step) is not None:
            return f"{name} does not keep its axis of channels"
        if name in _LINEAR:
            return first
        if name == "pad" and infos[1] is _ZERO:
            if step.eqn.params["padding_config"][first.axis] == (0, 0, 0):
                return first
            return "pad adds channels"
        if name == "sign" or (name in _SIGNS and _ZERO in infos):
            return None
        if name == "mul" and sum(isinstance(x, Channels) for x in infos) == 1:
            return first
        if name == "div" and not isinstance(infos[1], Channels):
            return first
        if name == "select_n" and not isinstance(infos[0], Channels):
            rest = infos[1:]
        elif name in _SUMS:
            rest = infos
        else:
            return f"{name} is not positively homogeneous, or reads more than this result"
        if len(data) == 1 and all(x is _ZERO or x == first for x in rest):
            return first
        other = next(x for x in rest if x != first and x is not _ZERO)
        if name in ("add", "sub", "add_any") and len(data) == 1 and isinstance(other, Leaf):
            axis = other.axes[first.axis]
            if axis is None:
                return f"{self.names[other.leaf]!r} has not one entry per channel and is added"
            self.groups[first.group].biases.append(Member(other.leaf, axis, first.every))
            return first
        return f"{name} joins it with another value"

    def _multiply(self, step: Step, infos: list[Any], line: str) -> Any:
        """Ends the groups of the data and begins that of the result."""
        sides = [i for i, x in enumerate(infos) if isinstance(x, Leaf)]
        made = [x for x in infos if isinstance(x, Derived)]
        found = product(step, sides[0]) if len(sides) == 1 and not made else None
        if found is None:
            self._block(infos, f"it is read by a product without a weight of its own at {line}")
            for leaf in {i for x in made for i in x.leaves} | {infos[i].leaf for i in sides}:
                self.skipped[leaf] = f"it is not the plain weight of a product at {line}"
            return None
        weight, data = infos[sides[0]], infos[found.data]
        if isinstance(data, Channels):
            reason = self._read(found, weight, data)
            if reason:
                self.groups[data.group].block(f"{reason} at {line}")
        axis = None if found.free is None else weight.axes[found.free]
        if axis is None:
            self.skipped[weight.leaf] = f"it has not one axis of output channels at {line}"
            return None
        size = step.out.shape[found.out]
        self.groups.append(Group(size, Member(weight.leaf, axis)))
        return Channels(len(self.groups) - 1, found.out)

    def _read(self, found: Product, weight: Leaf, data: Channels) -> str | None:
        if found.problem:
            return f"the product with {self.names[weight.leaf]!r}, which reads it, {found.problem}"
        at = found.contracted.get(data.axis)
        axis = None if at is None else weight.axes[at]
        if axis is None:
            return f"the product with {self.names[weight.leaf]!r} does not sum over its channels"
        self.groups[data.group].readers.append(Member(weight.leaf, axis, data.every))
        return None

    def _enclosed(self, step: Step, infos: list[Any], line: str) -> None:
        """Weights that only equations inside of ``step`` use."""
        if any(isinstance(v, core.ClosedJaxpr | core.Jaxpr) for v in step.eqn.params.values()):
            for info in infos:
                if isinstance(info, Leaf):
                    name = step.eqn.primitive.name
                    self.skipped[info.leaf] = f"it is used inside of {name} at {line}"

    def _settle(self, group: Group) -> None:
        if not group.readers:
            group.block("no product reads its channels")
        if group.size == 1:
            group.block("it has a single channel")
        for leaf, *_ in (group.writer, *group.biases, *group.readers):
            name, lines = self.names[leaf], self.used[leaf]
            if len(lines) > 1:
                group.block(f"{name!r} is used {len(lines)} times, also at {lines[1]}")
            if not jnp.issubdtype(self.dtypes[leaf], jnp.floating):
                group.block(f"{name!r} holds no real floating-point numbers")
