"""A dense parameter that remembers, through views and arithmetic, which axis is which."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxopt_compress.arrays import CompressedArray
from jaxopt_compress.lift import _compat
from jaxopt_compress.lift.interpreter import Call, Ref, leaf_rule
from jaxopt_compress.lift.views import matching_runs


class Axis(NamedTuple):
    """What one axis of a probe holds of a parameter.

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
        mixed: Whether arrays that are no parameters were added to it, or multiplied with it.
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

    value: Any
    members: tuple[Member, ...]
    entries: Any = None

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

    def relabel(self, value: Any, fn: Any, entries: Any = None) -> "Probe":
        """A view of this probe: ``fn(axes)`` gives the axes of ``value``."""
        moved = (m._replace(axes=(*self.stripped(m), *fn(self.axes_of(m)))) for m in self.members)
        return Probe(value, tuple(moved), entries)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all members."""
        return tuple(m.path for m in self.members)


def probe(path: str, value: Any) -> Probe:
    """A probe of a whole parameter."""
    shape = tuple(value.shape)
    return Probe(value, (Member(path, shape, tuple(Axis((d,)) for d in range(-len(shape), 0))),))


def _bind(call: Call, of: Callable[[Probe], Any] = lambda probe: probe.value) -> Any:
    values = [of(x.array) if isinstance(x, Ref) else x for x in call.operands]
    results = _compat.bind(call.eqn, values)
    return results if call.eqn.primitive.multiple_results else results[0]


def _entries(call: Call, at: int) -> Any:
    """The entries that a view of the operand ``at`` has."""
    if call.operands[at].array.entries is None:
        return None
    return _bind(call, lambda probe: probe.entries)


def _view(call: Call, at: int, fn: Callable[[Axes], Sequence[Axis]]) -> Probe:
    return call.operands[at].array.relabel(_bind(call), fn, _entries(call, at))


@leaf_rule("transpose", Probe)
def _transpose(call: Call, at: int) -> Any:
    order = call.params["permutation"]
    return _view(call, at, lambda axes: [axes[d] for d in order])


@leaf_rule("squeeze", Probe)
def _squeeze(call: Call, at: int) -> Any:
    gone, array = call.params["dimensions"], call.operands[at].array
    keep = lambda axes: [a for d, a in enumerate(axes) if d not in gone]
    result = _view(call, at, keep)

    def taken(m: Member) -> tuple[tuple[int, int], ...]:
        axes = (array.axes_of(m)[d] for d in gone)
        return tuple((a.names[0], a.index) for a in axes if a.index is not None)

    pairs = zip(array.members, result.members, strict=True)
    moved = tuple(new._replace(taken=old.taken + taken(old)) for old, new in pairs)
    return result.replace(members=moved)


@leaf_rule("slice", Probe)
def _slice(call: Call, at: int) -> Any:
    """A part of each axis; of which entry, if it is one of all."""
    array = call.operands[at].array
    bounds = list(zip(call.params["start_indices"], call.params["limit_indices"], strict=True))

    def cut(m: Member) -> Member:
        axes = list(array.axes_of(m))
        for d, (start, limit) in enumerate(bounds):
            names = axes[d].names
            whole = len(names) == 1 and m.shape[names[0]] == array.shape[d]
            if whole and axes[d].size is None and limit - start == 1:
                at = array.shape[d] - 1 - start if axes[d].turned else start
                axes[d] = axes[d]._replace(index=at)
        return m._replace(axes=(*array.stripped(m), *axes))

    return Probe(_bind(call), tuple(map(cut, array.members)), _entries(call, at))


@leaf_rule("broadcast_in_dim", Probe)
def _broadcast(call: Call, at: int) -> Any:
    dims, rank = call.params["broadcast_dimensions"], len(call.params["shape"])
    place = lambda axes: [axes[dims.index(d)] if d in dims else Axis() for d in range(rank)]
    return _view(call, at, place)


@leaf_rule("reshape", Probe)
def _reshape(call: Call, at: int) -> Any:
    """A split axis gives its name to each part, a merged one takes all names."""
    array = call.operands[at].array
    runs = matching_runs(array.shape, call.params["new_sizes"])
    if runs is None or call.params["dimensions"] is not None:
        return NotImplemented
    regrouped = [d for old, new in runs if (len(old), len(new)) != (1, 1) for d in old]
    if any(array.axes_of(m)[d].turned for m in array.members for d in regrouped):
        return NotImplemented

    def regroup(axes: Axes) -> list[Axis]:
        new = [Axis()] * len(call.params["new_sizes"])
        for old_axes, new_axes in runs:
            names = tuple(n for d in old_axes for n in axes[d].names)
            sizes = call.params["new_sizes"]
            # An axis of size 1 beside others is new, and belongs to none of them.
            own = [d for d in new_axes if sizes[d] > 1] or new_axes
            for d in own:
                new[d] = axes[old_axes[0]] if len(old_axes) == len(own) == 1 else Axis(names)
        return new

    return _view(call, at, regroup)


@leaf_rule("split unstack", Probe)
def _split(call: Call, at: int) -> Any:
    array, axis = call.operands[at].array, call.params["axis"]
    gone = call.eqn.primitive.name == "unstack"
    keep = lambda axes: [a for d, a in enumerate(axes) if not (gone and d == axis)]
    of_parts = _entries(call, at) or [None] * len(call.eqn.outvars)
    parts = zip(_bind(call), of_parts, strict=True)
    return [array.relabel(part, keep, entries) for part, entries in parts]


@leaf_rule("dynamic_slice", Probe)
def _dynamic_slice(call: Call, at: int) -> Any:
    """One entry of an axis is looked up; a longer part of one keeps its name."""
    if at:
        return NotImplemented
    array, starts = call.operands[0].array, call.operands[1:]
    sizes = call.params["slice_sizes"]
    found = [d for d, n in enumerate(sizes) if n == 1 < array.shape[d]]
    at_start = [jnp.clip(starts[d], 0, array.shape[d] - 1) for d in found]
    before = _entries(call, 0)
    return looked_up(array, _bind(call), lambda axes: axes, found, found, at_start, before)


@leaf_rule("rev", Probe)
def _rev(call: Call, at: int) -> Any:
    turned = call.params["dimensions"]

    def turn(axes: Axes) -> list[Axis]:
        return [a._replace(turned=a.turned ^ (d in turned)) for d, a in enumerate(axes)]

    return _view(call, at, turn)


def looked_up(
    array: Probe,
    value: Any,
    fn: Callable[[Axes], Sequence[Axis]],
    axes: Sequence[int],
    new: Sequence[int],
    indices: Sequence[Any],
    before: Any = None,
) -> Any:
    """The entries of a probe that data choose.

    Args:
        array: The probe.
        value: What was found.
        fn: ``fn(axes)`` gives the axes of ``value``.
        axes: The axes of ``array`` that were looked up.
        new: The axes of ``value`` that are new, and belong to no parameter.
        indices: Which entries, for each of ``axes``: int32, to be broadcast to ``value``.
        before: Of ``value``, which entry of axes that had been looked up before each element is
            from; None if none had been.

    Returns:
        A probe, or the bare value where it is not known which entries it holds.
    """
    whole = lambda m, d: len(array.axes_of(m)[d].names) == 1 and array.axes_of(m)[d].size is None
    if not axes:
        return array.relabel(value, fn)
    if len(array.members) != 1 or not all(whole(array.members[0], d) for d in axes):
        return value
    (member,) = array.members
    names = tuple(array.axes_of(member)[d].names[0] for d in axes)
    every, flat = names, jnp.zeros((), jnp.int32)
    for d, index in zip(axes, indices, strict=True):
        own = jnp.asarray(index, jnp.int32)
        own = array.shape[d] - 1 - own if array.axes_of(member)[d].turned else own
        flat = flat * array.shape[d] + own
    if old := member.looked_up:
        if before is None:
            return value
        size = lambda axes: math.prod(member.shape[d] for d in axes)
        last = max(old) < min(names)
        flat = before * size(names) + flat if last else flat * size(old) + before
        every = (*old, *names) if last else (*names, *old)
    if every != tuple(sorted(every)):
        return value
    found = array.relabel(value, fn, jnp.broadcast_to(flat, value.shape))
    (member,) = found.members
    free = [Axis() if d in new else a for d, a in enumerate(found.axes_of(member))]
    member = member._replace(axes=(*found.stripped(member), *free), looked_up=every)
    return found.replace(members=(member,))


@leaf_rule("reduce_sum reduce_max reduce_min reduce_and reduce_or reduce_prod", Probe)
def _reduce(call: Call, at: int) -> Any:
    """A reduced axis has no place in the result; it is one that the parameter is summed over."""
    gone, array = call.params["axes"], call.operands[at].array
    result = array.relabel(
        _bind(call), lambda axes: [a for d, a in enumerate(axes) if d not in gone]
    )

    def summed(m: Member) -> tuple[int, ...]:
        return tuple(n for d in gone for n in array.axes_of(m)[d].names)

    pairs = zip(array.members, result.members, strict=True)
    moved = tuple(new._replace(summed=old.summed + summed(old)) for old, new in pairs)
    return result.replace(members=moved)


@leaf_rule("stack", Probe)
def _stack(call: Call, at: int) -> Any:
    """Each part is one entry of a new axis."""
    value, along, members = _bind(call), call.params["axis"], []
    for i, x in enumerate(call.operands):
        if isinstance(x, Ref):
            place = lambda axes, i=i: [*axes[:along], Axis((), i, 1), *axes[along:]]
            members += x.array.relabel(value, place).members
    return Probe(value, tuple(members))


@leaf_rule("concatenate", Probe)
def _concatenate(call: Call, at: int) -> Any:
    value = _bind(call)
    along, start, members = call.params["dimension"], 0, []
    for x in call.operands:
        part = x.array if isinstance(x, Ref) else x
        size = part.shape[along]
        if isinstance(x, Ref):
            place = lambda axes, at=start, n=size: [
                Axis(a.names, at, n) if d == along else a for d, a in enumerate(axes)
            ]
            members += part.relabel(value, place).members
        start += size
    return Probe(value, tuple(members))


@leaf_rule(
    "convert_element_type reduce_precision copy copy_p stop_gradient name "
    "sharding_constraint reshard optimization_barrier pvary pcast add sub mul div neg abs sign exp "
    "exp2 log log1p tanh logistic sqrt rsqrt square max min pow integer_pow clamp round select_n "
    "add_any pad",
    Probe,
)
def _elementwise(call: Call, at: int) -> Any:
    """Arithmetic keeps the axes of each operand that has the shape of the result."""
    result = _bind(call)
    if isinstance(result, list):
        return [
            x.array.replace(value=y) if isinstance(x, Ref) else y
            for x, y in zip(call.operands, result, strict=True)
        ]
    if call.eqn.primitive.name == "select_n" and _alike(call.operands[1:]):
        return call.operands[1].array.replace(value=result)
    rank = len(result.shape)
    probes = [x.array for x in call.operands if isinstance(x, Ref)]
    members = [m for p in probes if len(p.shape) == rank for m in p.members]
    if any(getattr(x, "ndim", 0) for x in call.operands if not isinstance(x, Ref)):
        # A bias that is broadcast over an activation ends here: what it makes is no parameter.
        own = lambda m: m.axes[len(m.axes) - rank :]
        members = [
            m._replace(mixed=True) for m in members if m.looked_up or all(a.names for a in own(m))
        ]
    entries = [p.entries for p in probes if p.entries is not None and p.shape == result.shape]
    same = entries[0] if len(probes) == len(entries) == 1 else None
    return Probe(result, tuple(_distinct(members, rank)), same) if members else result


def _alike(operands: Sequence[Any]) -> bool:
    """Whether a choice between operands is the same weight in any case."""
    probes = [x.array for x in operands if isinstance(x, Ref)]
    same = len({p.members for p in probes}) == 1 and not any(m.looked_up for m in probes[0].members)
    return same and len(probes) == len(operands)


def _distinct(members: Sequence[Member], rank: int) -> list[Member]:
    """Each parameter as it is where most of its axes are known.

    A weight that is divided by its own norm meets a reduced form of itself.
    """
    known = lambda m: sum(bool(a.names) for a in m.axes[len(m.axes) - rank :])
    most = {m.path: max(known(o) for o in members if o.path == m.path) for m in members}
    return [m for m in dict.fromkeys(members) if known(m) == most[m.path]]
