"""Which parameters an equation sums over, and statistics of the activations that meet them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
from jax.extend.core import DebugInfo

from jaxopt_compress.lift import _compat
from jaxopt_compress.lift.interpreter import JaxprEqn, Ref
from jaxopt_compress.lift.lockstep.pieces import Pieces, signature
from jaxopt_compress.lift.lockstep.values import (
    Weight,
    computed,
    entries_of,
    present,
    replayed_on,
)
from jaxopt_compress.lift.observe.calibrate import Seen, measured_at
from jaxopt_compress.lift.observe.measures import Measure
from jaxopt_compress.lift.observe.meetings import Meeting
from jaxopt_compress.lift.observe.probe import Member, Probe
from jaxopt_compress.lift.observe.statistics import Statistics
from jaxopt_compress.lift.observe.tape import Key, Reducible, Tape, fold
from jaxopt_compress.lift.observe.ways import by_path
from jaxopt_compress.lift.segments import part
from jaxopt_compress.typing import Value


def look(eqn: JaxprEqn, operands: Sequence[Value]) -> tuple[set[str], list[tuple[Member, ...]]]:
    """The parameters that an equation sums over, and what its results hold of parameters."""
    met: set[str] = set()
    members: list[tuple[Member, ...]] = []

    def observe(tape: Tape, meeting: Meeting) -> None:
        del tape
        if meeting.vectors() is not None:
            met.add(meeting.path)

    def run(values: Sequence[Value], entries: Sequence[Value]) -> None:
        results = replayed_on(eqn, operands, values, entries, Tape(observe))
        members[:] = [x.array.members if _is_probe(x) else () for x in results]

    types = list(map(_compat.type_of, eqn.invars))
    numbers = [
        jax.ShapeDtypeStruct(t.shape, "int32") if isinstance(x, Weight) and x.entries else None
        for x, t in zip(operands, types, strict=True)
    ]
    jax.eval_shape(run, [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in types], numbers)
    return met, members


def _is_probe(x: Value) -> bool:
    return isinstance(x, Ref) and isinstance(x.array, Probe)


@dataclasses.dataclass
class Gauge:
    """Measures what meets parameters, over all batches.

    Attributes:
        pieces: Where programs are shared: paths are replaced by numbers in them.
        measures: What is measured.
        batches: How many batches are measured, and how many more are held out.
    """

    pieces: Pieces
    measures: Sequence[Measure]
    batches: tuple[int, int]

    def statistics(
        self, eqn: JaxprEqn, operands: Sequence[Value], origin: DebugInfo
    ) -> Callable[[str], list[Statistics]]:
        """``statistics(path)`` of the parameters that an equation meets, measured on first use."""

        @functools.cache
        def found() -> dict[str, list[Statistics]]:
            first, more = self.batches
            own = self._sums(eqn, operands, origin, range(first))
            if not more:
                return own
            other = self._sums(eqn, operands, origin, range(first, first + more))
            return {path: list(map(_with_held_out, own[path], other[path])) for path in own}

        return lambda path: found().get(path, [])

    def _sums(
        self, eqn: JaxprEqn, operands: Sequence[Value], origin: DebugInfo, batches: range
    ) -> dict[str, list[Statistics]]:
        paths = sorted({m.path for x in operands if isinstance(x, Weight) for m in x.members})
        number = {path: f"{i:04d}" for i, path in enumerate(paths)}
        plain = [_numbered(x, number) for x in operands]

        def measure(values: Sequence[Value], entries: Sequence[Value]) -> Seen:
            tape = Tape(functools.partial(measured_at, self.measures))
            replayed_on(eqn, plain, values, entries, tape)
            return Seen(dict(tape.values), tuple(sorted(tape.values, key=tape.place)))

        jaxpr, _ = part([eqn], [], origin)
        members = tuple(x.members if isinstance(x, Weight) else None for x in plain)
        run = self.pieces.shared((signature(jaxpr), members), lambda: measure)
        sums: dict[Key, Reducible] | None = None
        order: dict[Key, None] = {}
        fixed = [computed(x, max(batches) + 1) for x in operands]
        for b in batches:
            seen = run([present(x, b) for x in fixed], [entries_of(x, b) for x in operands])
            sums = seen.values if sums is None else _add(sums, seen.values)
            order.update(dict.fromkeys(seen.order))
        named = by_path({key: (sums or {})[key] for key in order}, self.measures)
        return {paths[int(i)]: found for i, found in named.items()}


@jax.jit
def _add(a: Value, b: Value) -> Value:
    return fold(a, b)


def _numbered(x: Value, number: dict[str, str]) -> Value:
    if not isinstance(x, Weight):
        return x
    # Which entry of a stack it is does not matter to what meets it.
    members = tuple(m._replace(path=number[m.path], taken=()) for m in x.members)
    return dataclasses.replace(x, members=members)


def _with_held_out(own: Statistics, other: Statistics) -> Statistics:
    return dataclasses.replace(own, held_out=other)
