"""Rules for probes in views, arithmetic and reductions."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from jaxopt_compress.lift import _compat
from jaxopt_compress.lift.interpreter import Call, Ref, leaf_rule
from jaxopt_compress.lift.observe.entries import looked_up
from jaxopt_compress.lift.observe.probe import Axes, Axis, Member, Probe
from jaxopt_compress.lift.views import matching_runs
from jaxopt_compress.typing import Value


def _bind(call: Call, of: Callable[[Probe], Value] = lambda probe: probe.value) -> Value:
    values = [of(x.array) if isinstance(x, Ref) else x for x in call.operands]
    results = _compat.bind(call.eqn, values)
    return results if call.eqn.primitive.multiple_results else results[0]


def _entries(call: Call, at: int) -> Value:
    """The entries that a view of the operand ``at`` has."""
    if call.operands[at].array.entries is None:
        return None
    return _bind(call, lambda probe: probe.entries)


def _view(call: Call, at: int, fn: Callable[[Axes], Sequence[Axis]]) -> Probe:
    return call.operands[at].array.relabel(_bind(call), fn, _entries(call, at))


@leaf_rule("transpose", Probe)
def _transpose(call: Call, at: int) -> Value:
    order = call.params["permutation"]
    return _view(call, at, lambda axes: [axes[d] for d in order])


@leaf_rule("squeeze", Probe)
def _squeeze(call: Call, at: int) -> Value:
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
def _slice(call: Call, at: int) -> Value:
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
def _broadcast(call: Call, at: int) -> Value:
    dims, rank = call.params["broadcast_dimensions"], len(call.params["shape"])
    place = lambda axes: [axes[dims.index(d)] if d in dims else Axis() for d in range(rank)]
    return _view(call, at, place)


@leaf_rule("reshape", Probe)
def _reshape(call: Call, at: int) -> Value:
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
def _split(call: Call, at: int) -> Value:
    array, axis = call.operands[at].array, call.params["axis"]
    gone = call.eqn.primitive.name == "unstack"
    keep = lambda axes: [a for d, a in enumerate(axes) if not (gone and d == axis)]
    of_parts = _entries(call, at) or [None] * len(call.eqn.outvars)
    parts = zip(_bind(call), of_parts, strict=True)
    return [array.relabel(part, keep, entries) for part, entries in parts]


@leaf_rule("dynamic_slice", Probe)
def _dynamic_slice(call: Call, at: int) -> Value:
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
def _rev(call: Call, at: int) -> Value:
    turned = call.params["dimensions"]

    def turn(axes: Axes) -> list[Axis]:
        return [a._replace(turned=a.turned ^ (d in turned)) for d, a in enumerate(axes)]

    return _view(call, at, turn)


@leaf_rule("reduce_sum reduce_max reduce_min reduce_and reduce_or reduce_prod", Probe)
def _reduce(call: Call, at: int) -> Value:
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
def _stack(call: Call, at: int) -> Value:
    """Each part is one entry of a new axis."""
    value, along, members = _bind(call), call.params["axis"], []
    for i, x in enumerate(call.operands):
        if isinstance(x, Ref):
            place = lambda axes, i=i: [*axes[:along], Axis((), i, 1), *axes[along:]]
            members += x.array.relabel(value, place).members
    return Probe(value, tuple(members))


@leaf_rule("concatenate", Probe)
def _concatenate(call: Call, at: int) -> Value:
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
def _elementwise(call: Call, at: int) -> Value:
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
        # A bias that is broadcast over an activation ends here: the result is an activation.
        own = lambda m: m.axes[len(m.axes) - rank :]
        members = [
            m._replace(mixed=True) for m in members if m.looked_up or all(a.names for a in own(m))
        ]
    entries = [p.entries for p in probes if p.entries is not None and p.shape == result.shape]
    same = entries[0] if len(probes) == len(entries) == 1 else None
    return Probe(result, tuple(_distinct(members, rank)), same) if members else result


def _alike(operands: Sequence[Value]) -> bool:
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
