"""Carrying observations out of the bodies of control flow.

A value computed inside a scan cannot leave it by itself: the body has to return it. The tape is the
frame of values observed so far; each control-flow rule collects a frame of its own in its body,
returns it as one more result, and absorbs it outside.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass
class Tape:
    """Observations of one replay.

    Attributes:
        observe: ``observe(tape, call, probe, use, activation)``, called at each use of a parameter.
        values: The current frame: key -> a `Reducible` of arrays.
        loops: The loops around the current equation: ``(length or None, paths scanned over)``.
    """

    observe: Callable[..., None]
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    loops: list[tuple[int | None, frozenset[str]]] = dataclasses.field(default_factory=list)

    def add(self, key: str, value: Any) -> None:
        """Merges one observation into the current frame."""
        self.values = fold(self.values, {key: value})


@dataclasses.dataclass
class Frame:
    """What was observed inside one body."""

    values: dict[str, Any]


@contextlib.contextmanager
def collect(tape: Tape | None, loop: tuple[int | None, frozenset[str]] | None = None) -> Iterator:
    """Observes into a frame of its own, inside a body that runs as ``loop`` says."""
    frame = Frame({})
    if tape is None:
        yield frame
        return
    outer, tape.values = tape.values, {}
    if loop is not None:
        tape.loops.append(loop)
    try:
        yield frame
        frame.values = tape.values
    finally:
        tape.values = outer
        if loop is not None:
            tape.loops.pop()


def fold(frame: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Merges two frames: sums are added, extremes compared."""
    merged = dict(frame)
    for key, value in other.items():
        merged[key] = merged[key].merge(value) if key in merged else value
    return merged


def absorb(tape: Tape | None, seen: dict[str, Any]) -> None:
    """Merges the frame of a body into the current one."""
    if tape is not None:
        tape.values = fold(tape.values, seen)


def absorb_scan(tape: Tape | None, seen: dict[str, Any], scanned: frozenset[str]) -> None:
    """As `absorb`, for frames stacked by a scan: what was scanned over stays stacked."""
    whole = lambda key: any(key == p or key.startswith(f"{p}\n") for p in scanned)
    absorb(tape, {k: v if whole(k) else v.reduce_leading() for k, v in seen.items()})


def absorb_manual(tape: Tape | None, seen: dict[str, Any]) -> dict[str, Any]:
    """The frame of a shard_map body, reduced over the devices it varies on."""
    return {} if tape is None else {k: v.reduce_devices() for k, v in seen.items()}


def empty(tape: Tape | None, body: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """The frame that ``body(*args) -> (results, frame)`` will fill, before it has run."""
    if tape is None:
        return {}
    _, seen = jax.eval_shape(body, *args)
    return {k: v.identity() for k, v in seen.items()}


def align(tape: Tape | None, branches: Sequence[Callable], operands: Sequence[Any]) -> list:
    """Makes all branches ``(*operands) -> (results, frame)`` return the same frame."""
    if tape is None:
        return list(branches)
    union: dict[str, Any] = {}
    for branch in branches:
        union |= empty(tape, branch, *operands)

    def padded(branch):
        def run(*values):
            results, seen = branch(*values)
            return results, {**union, **seen}

        return run

    return [padded(branch) for branch in branches]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reducible:
    """Sums and extremes: what can be merged over batches, loop steps and devices.

    Attributes:
        sums: Arrays that add up.
        lows: Arrays of which the smallest entries count.
        highs: Arrays of which the largest entries count.
    """

    sums: dict[str, jax.Array]
    lows: dict[str, jax.Array]
    highs: dict[str, jax.Array]

    def _map(self, add: Callable, low: Callable, high: Callable, *rest: Any) -> "Reducible":
        return Reducible(
            jax.tree.map(add, self.sums, *(r.sums for r in rest)),
            jax.tree.map(low, self.lows, *(r.lows for r in rest)),
            jax.tree.map(high, self.highs, *(r.highs for r in rest)),
        )

    def merge(self, other: "Reducible") -> "Reducible":
        """Both together."""
        return self._map(jnp.add, jnp.minimum, jnp.maximum, other)

    def reduce_leading(self) -> "Reducible":
        """All entries of the leading axis together."""
        return self._map(lambda x: x.sum(0), lambda x: x.min(0), lambda x: x.max(0))

    def reduce_devices(self) -> "Reducible":
        """All devices together that see different rows, inside of a shard_map."""
        varying = lambda x: jax.typeof(x).manual_axis_type.varying
        # Counts do not depend on data: they vary over whatever axes the sums vary over.
        axes = frozenset().union(*map(varying, jax.tree.leaves(self)))

        def over(op: Callable) -> Callable:
            spread = lambda x: lax.pcast(x, tuple(axes - varying(x)), to="varying")
            return lambda x: op(spread(x) if axes - varying(x) else x, tuple(axes))

        return self._map(over(lax.psum), over(lax.pmin), over(lax.pmax))

    def identity(self) -> "Reducible":
        """What merging changes nothing."""
        full = lambda value: lambda x: jnp.full(x.shape, value, x.dtype)
        return self._map(full(0), full(jnp.inf), full(-jnp.inf))
