"""Running a function over data, to measure what meets each parameter."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import CompressedArray
from jaxopt_compress.lift.observe.measures import Measure, means, moments, ranges
from jaxopt_compress.lift.observe.meetings import Meeting
from jaxopt_compress.lift.observe.observed import observed_call
from jaxopt_compress.lift.observe.statistics import Statistics
from jaxopt_compress.lift.observe.tape import Key, Reducible, Tape, fold
from jaxopt_compress.lift.observe.ways import GRADIENT, Way, by_path
from jaxopt_compress.tree import Where, map_named, named_leaves, select
from jaxopt_compress.typing import PyTree, Value


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["order"])
@dataclasses.dataclass(frozen=True)
class Seen:
    """The sums measured so far; ``order`` has their keys in program order."""

    values: dict[Key, Reducible]
    order: tuple[Key, ...]


def calibrate(
    fn: Callable[..., PyTree],
    params: PyTree,
    batches: Iterable[PyTree],
    where: Where = None,
    measures: Sequence[Measure] = (moments(), ranges(), means()),
) -> dict[str, list[Statistics]]:
    """Runs a function over batches and measures what meets each parameter.

    One compiled step per shape of a batch adds each batch to running sums, so memory holds one
    batch and the sums that the measures ask for. Sharded parameters and batches are summed over all
    devices. Batches without any entry are skipped.

    Args:
        fn: Any JAX function, called as ``fn(params, *batch)`` if a batch is a tuple, else as
            ``fn(params, batch)``. For measures of gradients, such as `measures.fisher`, it returns
            a scalar.
        params: A pytree.
        batches: An iterable of batches.
        where: Which parameters are measured; None for the floating leaves of rank 2 and more.
        measures: What is measured: those of `jaxopt_compress.measures`, and your own.

    Returns:
        Path -> a list of `Statistics`, one per distinct way in which the parameter is contracted,
        in the order in which the function first meets them. Parameters that no product or
        convolution sums over (tables that are only looked up) are left out; with measures of
        gradients, they have one entry of these alone, with no contracting axes.

    Raises:
        ValueError: There are no batches, two measures have one name, ``where`` matches nothing, or
            a measure of gradients is taken of a function that returns no scalar.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> batches = [jnp.array([[1.0, -2.0]]), jnp.array([[3.0, 0.0], [2.0, 2.0]])]
        >>> stats = jc.calibrate(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 4))}, batches)["w"][0]
        >>> stats.mean, stats.absmax, stats.rows
        (Array([2., 0.], dtype=float32), Array([3., 2.], dtype=float32), Array(3, dtype=int32))
    """
    measures = checked(measures)
    if hasattr(batches, "shape"):
        raise TypeError("batches is one array; pass an iterable of batches, such as [x]")
    chosen = frozenset(select(params, where))

    missed: set[str] = set()

    @jax.jit
    def measure(params: PyTree, batch: tuple[PyTree, ...]) -> Seen:
        return _measured_call(fn, measures, chosen, params, batch, missed)

    add = jax.jit(fold, donate_argnums=0)
    sums: dict[Key, Reducible] | None = None
    order: dict[Key, None] = {}
    for batch in batches:
        batch = batch if isinstance(batch, tuple) else (batch,)
        if _is_empty(batch):
            continue
        seen = measure(params, batch)
        sums = seen.values if sums is None else add(sums, seen.values)
        order.update(dict.fromkeys(seen.order))
    if sums is None:
        raise ValueError("calibrate needs at least one batch that is not empty, and there is none")
    if unknown := sorted(missed - {key.path for key in order}):
        warnings.warn(
            f"there are no statistics of {', '.join(unknown)}: the sums of their products run over "
            "axes that are not their own alone, such as the choice of an expert, or over entries "
            "in another order; compress them by methods without data, or leave them out",
            UnmeasuredWarning,
            stacklevel=2,
        )
    return by_path({key: sums[key] for key in order}, measures)


class UnmeasuredWarning(UserWarning):
    """A parameter is summed over, and nothing could be measured of its inputs."""


def _measured_call(
    fn: Callable[..., PyTree],
    measures: Sequence[Measure],
    chosen: frozenset[str],
    params: PyTree,
    batch: tuple[PyTree, ...],
    missed: set[str] | None = None,
) -> Seen:
    """The measurements of one batch."""
    tape = Tape(functools.partial(measured_at, measures, missed=missed))
    result = observed_call(fn, tape, chosen, params, batch, {})
    values = dict(tape.values)
    if any(m.of_gradient is not None for m in measures):
        values |= _of_gradients(fn, measures, chosen, params, batch, result)
    return Seen(values, tuple(sorted(values, key=tape.place)))


def abstract_statistics(
    fn: Callable[..., PyTree],
    params: PyTree,
    batch: tuple[PyTree, ...],
    measures: Sequence[Measure],
) -> dict[str, list[Statistics]]:
    """The types of the statistics that `calibrate` would return; nothing is computed."""
    measures, chosen = checked(measures), frozenset(select(params))
    flat, treedef = jax.tree.flatten((params, batch))
    at = [i for i, x in enumerate(flat) if hasattr(x, "shape")]

    def run(values: list[Value]) -> dict[str, list[Statistics]]:
        full = list(flat)
        for i, value in zip(at, values, strict=True):
            full[i] = value
        inner, args = jax.tree.unflatten(treedef, full)
        seen = _measured_call(fn, measures, chosen, inner, args)
        return by_path({key: seen.values[key] for key in seen.order}, measures)

    return jax.eval_shape(run, [flat[i] for i in at])


def checked(measures: Sequence[Measure]) -> tuple[Measure, ...]:
    """The measures, once it is sure that they are some, under different names."""
    measures = (measures,) if isinstance(measures, Measure) else tuple(measures)
    for m in measures:
        if not isinstance(m, Measure):
            raise TypeError(f"measures={m!r}; take one of jaxopt_compress.measures, as moments()")
        if (m.observe is None) == (m.of_gradient is None):
            raise ValueError(f"the measure {m.name!r} needs either observe or of_gradient")
    names = [m.name for m in measures]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two measures have the name {twice[0]!r}; give one of them another")
    return measures


def _is_empty(batch: tuple[PyTree, ...]) -> bool:
    arrays = [x for x in jax.tree.leaves(batch) if hasattr(x, "size")]
    return bool(arrays) and all(x.size == 0 for x in arrays)


def measured_at(
    measures: Sequence[Measure], tape: Tape, meeting: Meeting, missed: set[str] | None = None
) -> None:
    """The observer that measures what meets a parameter; ``missed`` gets those it cannot."""
    turned = any(a.turned for a in meeting.sliced)
    seen = None if turned else meeting.vectors()
    if seen is None:
        if missed is not None and meeting.roles.contracting:
            missed.add(meeting.path)
        return
    x, inside = seen
    if meeting.op == "conv_general_dilated" and x.shape[0] == 1:
        x = x[0]
    key = Key(meeting.path, _way(meeting, x.shape[:-2]), bool(meeting.sliced))
    tape.place(key)
    found = _measured(measures, x.astype(jnp.float32), inside)
    if meeting.entry is not None:
        sizes = tuple(meeting.shape[d] for d in meeting.looked_up)
        found = found.at_entry(meeting.entry(), sizes, _before(meeting, meeting.looked_up))
    tape.add(key, found)


def _way(meeting: Meeting, lead: tuple[int, ...]) -> Way:
    parts = tuple((a.start, a.size or -1, bool(a.names)) for a in meeting.sliced)
    way = Way(meeting.roles.contracting, lead, parts, window=meeting.window)
    axes = sorted(meeting.taken)
    places = {_before(meeting, [axis]) for axis, _ in axes}
    if len(places) == 1:
        taken = tuple((index, meeting.shape[axis]) for axis, index in axes)
        way = way._replace(at=places.pop(), taken=taken)
    # Otherwise none is taken; or others are between them, and all entries count as one.
    return way._replace(stack=_stack(meeting, [axis for axis, _ in axes if way.taken]))


def _stack(meeting: Meeting, taken: Sequence[int]) -> tuple[int, ...]:
    """The parameter's axes that the measured values have in front; () if unknown."""
    cut = [a.names for a in meeting.sliced if a.names]
    if any(len(names) > 1 for names in cut) or (taken and meeting.looked_up):
        return ()
    own = [*(names[0] for names in cut), *meeting.shared]
    chosen = sorted([*taken, *meeting.looked_up])
    at = _before(meeting, chosen) if chosen else 0
    return (*own[:at], *chosen, *own[at:])


def _before(meeting: Meeting, axes: Sequence[int]) -> int:
    """How many leading axes of the measured values come before some axes of the parameter."""
    lead = [n for a in meeting.sliced for n in a.names] + list(meeting.shared)
    return sum(n < min(axes) for n in lead)


def _measured(measures: Sequence[Measure], x: Value, inside: Value) -> Reducible:
    if inside is None:
        rows = jnp.full(x.shape[:-2], x.shape[-2], jnp.int32)
    else:
        rows = inside.sum(-1, dtype=jnp.int32)
    found = {m.name: m.observe(x, inside) for m in measures if m.observe is not None}
    return _together(found, {"rows": rows})


def _together(found: dict[str, Reducible], counts: dict[str, jax.Array]) -> Reducible:
    """All measures of one thing as one."""
    return Reducible(
        {"counts": counts, "measures": {name: r.sums for name, r in found.items()}},
        {name: r.lows for name, r in found.items()},
        {name: r.highs for name, r in found.items()},
    )


def _of_gradients(
    fn: Callable[..., PyTree],
    measures: Sequence[Measure],
    chosen: frozenset[str],
    params: PyTree,
    batch: tuple[PyTree, ...],
    result: PyTree,
) -> dict[Key, Reducible]:
    """Measurements of the gradients of ``fn`` by the parameters at the paths ``chosen``."""
    asked = {m.name: m.of_gradient for m in measures if m.of_gradient is not None}
    kinds = [(tuple(jnp.shape(x)), str(jnp.result_type(x))) for x in jax.tree.leaves(result)]
    scalar = len(kinds) == 1 and kinds[0][0] == () and jnp.issubdtype(kinds[0][1], jnp.floating)
    if not scalar:
        raise ValueError(
            f"the measure {next(iter(asked))!r} takes the gradient of fn, which has to return one "
            f"floating scalar, and returns arrays of (shape, dtype) {kinds}: pass the loss"
        )
    dense = map_named(
        lambda path, x: x.materialize() if isinstance(x, CompressedArray) else x, params
    )
    followed = {path: x for path, x in named_leaves(dense) if path in chosen}

    def loss(followed: dict[str, Value]) -> Value:
        return fn(map_named(lambda path, x: followed.get(path, x), dense), *batch)

    gradients = jax.grad(lambda w: jax.tree.leaves(loss(w))[0])(followed)
    return {
        Key(path, GRADIENT): _together({name: of(g) for name, of in asked.items()}, {})
        for path, g in gradients.items()
    }
