"""Where a parameter meets an activation, and how observers are told."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.lift.interpreter import Call
from jaxopt_compress.lift.observe.entries import by_entry, chosen_axes, one_entry
from jaxopt_compress.lift.observe.probe import Axes, Axis, Member, Probe
from jaxopt_compress.typing import Value

Rows = tuple[jax.Array, jax.Array | None]


class Roles(NamedTuple):
    """The axes of a parameter by what they do; its own, negative and sorted.

    Attributes:
        contracting: Axes that are summed over.
        output: Axes that appear in the result.
        batch: Axes that the activation shares.
        gathered: Axes that are looked up.
        stack: Axes that loops or indices have stripped, or that data choose entries of.
    """

    contracting: tuple[int, ...]
    output: tuple[int, ...]
    batch: tuple[int, ...]
    gathered: tuple[int, ...]
    stack: tuple[int, ...]


class Meeting(NamedTuple):
    """One parameter meets an activation.

    Attributes:
        path: The path of the parameter.
        shape: Its shape.
        op: The primitive.
        roles: What its axes do.
        window: Its own contracted axes that the window of a convolution spans.
        sliced: What the axes that scans have stripped hold of it.
        taken: ``(axis, index)`` of its own axes of which this is one known entry.
        looked_up: Its own axes of which data choose entries.
        shared: Its own axes that are the leading ones of `vectors`, as far as they are its own.
        rows: How many rows of the activation each entry meets.
        size: How many entries of the operand that holds the parameter meet them.
        vectors: ``vectors()``: the activation as ``[*lead, rows, k]``, where ``k`` are the
            contracted axes in the order of the parameter's own, and booleans ``[*lead, rows]``,
            which rows count, or None for all. None where nothing is summed over, or where it is
            not known which axes are. Among ``lead`` are the axes that are looked up, unless
            ``entry`` says which entry it is.
        entry: ``entry()``: the one entry of the axes that are looked up, int32, where it is one for
            all of the activation; else None.
        activation: ``activation()``: as the function has it. None for a lookup.
        result: ``result()``: the result of the operation; of a joined weight, the member's part.
        source: The line of the function.
        place: What this meeting is known by, however often it is traced.
    """

    path: str
    shape: tuple[int, ...]
    op: str
    roles: Roles
    window: tuple[int, ...]
    sliced: Axes
    taken: tuple[tuple[int, int], ...]
    looked_up: tuple[int, ...]
    shared: tuple[int, ...]
    rows: float
    size: int
    vectors: Callable[[], Rows | None]
    entry: Callable[[], jax.Array] | None
    activation: Callable[[], jax.Array] | None
    result: Callable[[], jax.Array]
    source: str
    place: Hashable


class Operation(NamedTuple):
    """An operation, as its rule sees it; axes are those of the probe ``w``.

    ``order`` brings the activation into the form of `Meeting.vectors`; ``outputs`` says which axis
    of the result an axis of ``w`` becomes; ``window`` are axes that a window spans.
    """

    op: str
    w: Probe
    contracting: tuple[int, ...]
    batch: tuple[int, ...]
    gathered: tuple[int, ...]
    rows: float
    activation: Value
    order: Callable[[], Value] | None
    outputs: dict[int, int]
    window: tuple[int, ...] = ()


def announce(call: Call, operation: Operation, result: Value) -> None:
    """Tells the observer of each parameter that the operand of an operation holds."""
    tape = call.replay.tape
    if tape is None:
        return
    w = operation.w
    enclosing = tuple(map(id, call.replay.enclosing))
    for member in w.members:
        lead = 1 if operation.op == "conv_general_dilated" else len(operation.batch)
        activation = None if operation.activation is None else lambda: operation.activation
        meeting = Meeting(
            path=member.path,
            shape=member.shape,
            op=operation.op,
            roles=_roles(operation, member),
            window=_named(operation.w.axes_of(member), operation.window),
            sliced=w.stripped(member),
            taken=member.taken,
            looked_up=member.looked_up,
            shared=tuple(n for d in operation.batch for n in w.axes_of(member)[d].names[:1]),
            rows=operation.rows,
            size=math.prod(w.shape),
            vectors=lambda member=member, lead=lead: _vectors(operation, member, lead),
            entry=_entry(operation, member),
            activation=activation,
            result=lambda member=member: _part(operation, member, result),
            source=call.replay.source_line(call.eqn),
            place=(*enclosing, id(call.eqn), member),
        )
        tape.observe(tape, meeting)


def _roles(operation: Operation, member: Member) -> Roles:
    axes = operation.w.axes_of(member)
    taken = (*operation.contracting, *operation.batch, *operation.gathered)
    free = [d for d in range(len(axes)) if d not in taken]
    by_role = (operation.contracting, free, operation.batch, operation.gathered)
    named = [_named(axes, role) for role in by_role]
    named[0] = tuple(sorted({*named[0], *member.summed}))
    known = {n for role in named for n in role}
    stack = tuple(d for d in range(-len(member.shape), 0) if d not in known)
    contracting, output, batch, gathered = named
    return Roles(contracting, output, batch, gathered, stack)


def _named(axes: Axes, role: Sequence[int]) -> tuple[int, ...]:
    """The parameter's own axes that axes of an operand hold."""
    return tuple(sorted({n for d in role for n in axes[d].names}))


def _part(operation: Operation, member: Member, result: jax.Array) -> jax.Array:
    """The part of a result that comes from ``member``."""
    axes = operation.w.axes_of(member)
    for d, at in operation.outputs.items():
        cut = axes[d]
        if cut.size is not None:
            result = lax.slice_in_dim(result, cut.start, cut.start + cut.size, axis=at)
    return result


def _vectors(operation: Operation, member: Member, lead: int) -> Rows | None:
    axes = operation.w.axes_of(member)
    cuts = [axes[d] for d in operation.contracting]
    order = [cut.names for cut in cuts]
    if operation.order is None or not cuts or not all(order):
        return None
    rows = operation.order()
    x, inside = rows if isinstance(rows, tuple) else (rows, None)
    for i, cut in enumerate(cuts):
        if cut.size is not None:
            x = lax.slice_in_dim(x, cut.start, cut.start + cut.size, axis=lead + 1 + i)
        if cut.turned:
            x = jnp.flip(x, lead + 1 + i)
    if operation.op != "conv_general_dilated":
        ranks = sorted(range(len(order)), key=lambda i: order[i])
        x = x.transpose(*range(lead + 1), *(lead + 1 + i for i in ranks))
        for n in sorted(member.summed):
            # Each entry of an axis that was summed over before meets the same activation.
            at = lead + 1 + sum(min(names) < n for names in order)
            repeats = [*x.shape[:at], member.shape[n], *x.shape[at:]]
            x = jnp.broadcast_to(jnp.expand_dims(x, at), repeats)
            order.append((n,))
    whole = math.prod(member.shape[d] for d in {n for names in order for n in names})
    entries = math.prod(x.shape[lead + 1 :])
    if entries != whole:
        raise ValueError(
            f"{member.path!r} of shape {member.shape} meets activations of {entries} entries "
            f"where its contracted axes have {whole}: it is cut, or split over devices inside a "
            "shard_map, along an axis that is summed over; calibrate with a function that leaves "
            "it whole"
        )
    x = x.reshape(*x.shape[: lead + 1], whole)
    # Each of several weights that are joined along a shared axis meets its part of the activation.
    for i, d in reversed(list(enumerate(operation.batch))):
        cut = axes[d]
        if cut.size is not None and operation.op == "dot_general":
            x = _own_part(x, i, cut)
            inside = None if inside is None else _own_part(inside, i, cut)
    if not member.looked_up:
        # Along an axis that is new to the weight all rows meet the same one.
        new = [i for i, d in enumerate(operation.batch) if axes[d] == Axis()]
        return _as_rows(x, new) if new and operation.op == "dot_general" else x, inside
    if _entry(operation, member) is not None:
        return x, inside
    shared = [n for d in operation.batch for n in axes[d].names]
    apart = any(min(member.looked_up) < n < max(member.looked_up) for n in shared)
    if operation.op != "dot_general" or operation.w.entries is None or apart:
        return None
    return by_entry(x, operation.w, member, operation.contracting, operation.batch)


def _entry(operation: Operation, member: Member) -> Callable[[], jax.Array] | None:
    """The entry that was looked up, if it is one."""
    w = operation.w
    if not member.looked_up or w.entries is None or chosen_axes(w, member, operation.contracting):
        return None
    return lambda: one_entry(w)


def _as_rows(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Leading axes of ``[*lead, rows, k]`` as more rows."""
    lead = [i for i in range(x.ndim - 2) if i not in axes]
    shape = [x.shape[i] for i in lead]
    return x.transpose(*lead, *axes, x.ndim - 2, x.ndim - 1).reshape(*shape, -1, x.shape[-1])


def _own_part(x: jax.Array, axis: int, cut: Axis) -> jax.Array:
    """The part of an axis that belongs to a member; without the axis if that is new to it."""
    part = lax.slice_in_dim(x, cut.start, cut.start + (cut.size or 0), axis=axis)
    return part if cut.names else part.squeeze(axis)
