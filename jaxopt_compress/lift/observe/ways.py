"""From what was seen at each meeting to the statistics of each parameter."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_compress.lift.observe.measures import Measure
from jaxopt_compress.lift.observe.statistics import Statistics
from jaxopt_compress.lift.observe.tape import Key, Reducible


class Way(NamedTuple):
    """A way in which a parameter is contracted; sortable.

    Attributes:
        contracting: The contracted axes, negative.
        shape: The sizes of the leading axes that the parameter shares with the activation.
        parts: ``(start, size, whole)`` of the parameter in each axis that scans strip: size -1 is
            all of it; not ``whole`` are those made by stacking parameters.
        at: Where `taken` goes among the leading axes.
        taken: ``(index, length)`` of the parameter's axes of which this is one entry.
        window: The contracted axes that the window of a convolution spans.
        stack: The parameter's axes that the leading ones are, in their order; () if unknown.
    """

    contracting: tuple[int, ...]
    shape: tuple[int, ...] = ()
    parts: tuple[tuple[int, int, bool], ...] = ()
    at: int = 0
    taken: tuple[tuple[int, int], ...] = ()
    window: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()


# The kind of values that are measured on gradients.
GRADIENT = Way((), (-1,))


def by_path(sums: dict[Key, Reducible], measures: Sequence[Measure]) -> dict[str, list[Statistics]]:
    """Statistics by path, each list in the order of ``sums``."""
    results = tuple((m.name, m.result) for m in measures)
    names = tuple(m.name for m in measures if m.of_gradient is not None)
    of_gradients = {k.path: _values(v) for k, v in sums.items() if k.kind == GRADIENT}
    named: dict[str, list[Statistics]] = {}
    for (path, contracting, window, stack), ways in _ways(sums).items():
        for value in ways:
            value, own = _sorted(value, stack)
            values = {**_values(value), **of_gradients.get(path, {})}
            entry = Statistics(
                value.sums["counts"]["rows"],
                values,
                contracting,
                results,
                of_gradients=names,
                window=window,
                stack=own,
            )
            named.setdefault(path, []).append(entry)
    for path, values in of_gradients.items():
        nothing = [Statistics(jnp.zeros((), jnp.int32), values, (), results, of_gradients=names)]
        named.setdefault(path, nothing)
    return named


def _sorted(value: Reducible, stack: tuple[int, ...]) -> tuple[Reducible, tuple[int, ...]]:
    """Leading axes in the order of the parameter's own, and which these are."""
    count = value.sums["counts"]["rows"].ndim
    if len(stack) != count:
        return value, ()  # Such as the groups of a convolution, which are no axis of the kernel.
    order = sorted(range(count), key=lambda i: stack[i])
    turn = lambda x: jnp.transpose(x, (*order, *range(count, x.ndim)))
    return jax.tree.map(turn, value), tuple(sorted(stack))


def _ways(sums: dict[Key, Reducible]) -> dict[tuple[Any, ...], list[Reducible]]:
    """By path, contracted axes, window and stack, what was seen; several where sizes differ."""
    entries: dict[tuple[Any, ...], dict[tuple[int, ...], Reducible]] = {}
    for key, value in sums.items():
        if key.kind == GRADIENT:
            continue
        way = key.kind
        for d, part in reversed(list(enumerate(way.parts))):
            value = _own_part(value, d, *part)
        kind = (key.path, way.contracting, way.window, way.stack)
        group = (kind, way.at, tuple(n for _, n in way.taken))
        index = tuple(i for i, _ in way.taken)
        same = entries.setdefault((*group, value.sums["counts"]["rows"].shape), {})
        same[index] = same[index].merge(value) if index in same else value
    found: dict[tuple[Any, ...], dict[tuple[int, ...], Reducible]] = {}
    for (kind, at, sizes, _), by_index in entries.items():
        value = _stacked(by_index, at, sizes)
        same, shape = found.setdefault(kind, {}), value.sums["counts"]["rows"].shape
        same[shape] = same[shape].merge(value) if shape in same else value
    return {name: list(by_shape.values()) for name, by_shape in found.items()}


def _own_part(value: Reducible, axis: int, start: int, size: int, whole: bool) -> Reducible:
    """The part of a stripped axis that holds the parameter; without the axis if it is not its."""
    if size >= 0:
        cut = lambda x: lax.slice_in_dim(x, start, start + size, axis=axis)
        value = jax.tree.map(cut, value)
    if whole:
        return value
    return jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), value).reduce_leading()


def _stacked(
    by_index: dict[tuple[int, ...], Reducible], at: int, sizes: tuple[int, ...]
) -> Reducible:
    """Entries of a stack as one; those that were not seen have met no row."""
    if not sizes:
        return by_index[()]
    nothing = next(iter(by_index.values())).identity()
    entries = [by_index.get(index, nothing) for index in np.ndindex(*sizes)]

    def stack(*xs: jax.Array) -> jax.Array:
        x = jnp.stack(xs, at)
        return x.reshape(*x.shape[:at], *sizes, *x.shape[at + 1 :])

    return jax.tree.map(stack, *entries)


def _values(value: Reducible) -> dict[str, dict[str, jax.Array]]:
    merge = lambda name: {**value.sums["measures"][name], **value.lows[name], **value.highs[name]}
    return {name: merge(name) for name in value.sums["measures"]}
