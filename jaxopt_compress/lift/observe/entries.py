"""Entries of a parameter that data choose, and the rows of an activation that meet each of them."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxopt_compress.lift.observe.probe import Axes, Axis, Member, Probe
from jaxopt_compress.typing import Value


def looked_up(
    array: Probe,
    value: Value,
    fn: Callable[[Axes], Sequence[Axis]],
    axes: Sequence[int],
    new: Sequence[int],
    indices: Sequence[Value],
    before: jax.Array | None = None,
) -> Value:
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


def chosen_axes(w: Probe, member: Member, contracting: Sequence[int]) -> list[int]:
    """The axes of a probe along which different entries were looked up."""
    axes = w.axes_of(member)
    return [d for d in range(len(axes)) if d not in contracting and not axes[d].names]


def one_entry(w: Probe) -> jax.Array:
    """The number of the entry where all of a probe is from one."""
    return w.entries[(0,) * w.entries.ndim]


def by_entry(
    x: jax.Array,
    w: Probe,
    member: Member,
    contracting: Sequence[int],
    batch: Sequence[int],
) -> tuple[jax.Array, jax.Array]:
    """Sorts the rows of an activation by the entries that they meet.

    Args:
        x: ``[*batch, rows, k]``.
        w: What holds the parameter.
        member: The parameter, which was looked up along at least one axis.
        contracting: The axes of ``w`` that are summed over.
        batch: The axes of ``w`` that ``x`` shares.

    Returns:
        ``[*shared, *entries, rows', k]`` with the axes in the order of the parameter's own, and
        booleans ``[*shared, *entries, rows']``: which rows met which entry.
    """
    axes = w.axes_of(member)
    chosen = chosen_axes(w, member, contracting)
    shared = [i for i, d in enumerate(batch) if d not in chosen]
    mixed = [i for i, d in enumerate(batch) if d in chosen]
    rest = [d for d in chosen if d not in batch]
    kept = [batch[i] for i in shared] + [batch[i] for i in mixed] + rest
    gone = tuple(d for d in range(len(axes)) if d not in kept)
    numbers = w.entries[tuple(0 if d in gone else slice(None) for d in range(len(axes)))]
    left = [d for d in range(len(axes)) if d not in gone]
    numbers = numbers.transpose([left.index(d) for d in kept])

    rows, k = x.shape[-2:]
    lead = [x.shape[i] for i in shared]
    x = x.transpose(*shared, *mixed, len(batch), len(batch) + 1).reshape(*lead, -1, k)
    numbers = numbers.reshape(*lead, x.shape[-2] // max(rows, 1), -1)
    sizes = [member.shape[d] for d in member.looked_up]
    entry = jnp.arange(math.prod(sizes), dtype=jnp.int32)[:, None]
    meets = (numbers[..., None, :, :] == entry[..., None]).any(-1)
    meets = jnp.repeat(meets, rows, axis=-1, total_repeat_length=x.shape[-2])
    first = min(member.looked_up)
    at = sum(axes[batch[i]].names[0] < first for i in shared)
    x = jnp.broadcast_to(x[..., None, :, :], (*lead, *meets.shape[-2:], k))
    x, meets = jnp.moveaxis(x, len(lead), at), jnp.moveaxis(meets, len(lead), at)
    split = lambda a: a.reshape(*a.shape[:at], *sizes, *a.shape[at + 1 :])
    return split(x), split(meets)
