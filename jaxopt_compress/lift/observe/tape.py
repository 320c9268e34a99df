"""Carrying observations out of the bodies of control flow.

A value computed inside a scan cannot leave it by itself: the body has to return it. The tape is the
frame of values observed so far; each control-flow rule collects a frame of its own in its body,
returns it as one more result, and absorbs it outside.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.typing import PyTree, Value


class Key(NamedTuple):
    """The name of one observation.

    Attributes:
        path: The path of the parameter.
        kind: What tells it from other observations of the same parameter; sortable.
        sliced: Whether scans have stripped leading axes of the parameter.
    """

    path: str
    kind: Any
    sliced: bool = False


class Loop(NamedTuple):
    """Control flow around an equation.

    Attributes:
        kind: ``"scan"``, ``"while"``, ``"cond"`` or ``"shard_map"``.
        length: How often the body runs; None where it depends on data.
        scanned: The paths of the parameters that are scanned over.
    """

    kind: str
    length: int | None = None
    scanned: frozenset[str] = frozenset()


@dataclasses.dataclass
class Tape:
    """Observations of one replay.

    Attributes:
        observe: ``observe(tape, meeting)``, called each time that a parameter meets an activation.
            A body may be traced more than once, so it may be called more than once for a meeting.
        values: The current frame: `Key` -> a `Reducible` of arrays, or what has its methods.
        loops: The control flow around the current equation.
        order: The place of each thing observed, in program order.
    """

    observe: Callable[["Tape", Any], None]
    values: dict[Key, Value] = dataclasses.field(default_factory=dict)
    loops: list[Loop] = dataclasses.field(default_factory=list)
    order: dict[Hashable, int] = dataclasses.field(default_factory=dict)

    def add(self, key: Key, value: Value) -> None:
        """Merges one observation into the current frame."""
        self.values = fold(self.values, {key: value})

    def place(self, what: Hashable) -> int:
        """How many other things were observed before ``what`` was for the first time.

        Frames that leave a body are pytrees, which forget the order of their keys.
        """
        return self.order.setdefault(what, len(self.order))


@dataclasses.dataclass
class Frame:
    """The observations inside one body."""

    values: dict[Key, Value]


@contextlib.contextmanager
def collect(tape: Tape | None, loop: Loop | None = None) -> Iterator[Frame]:
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


def fold(frame: dict[Key, Value], other: dict[Key, Value]) -> dict[Key, Value]:
    """Merges two frames: sums are added, extremes compared."""
    merged = dict(frame)
    for key, value in other.items():
        merged[key] = merged[key].merge(value) if key in merged else value
    return merged


def absorb(tape: Tape | None, seen: dict[Key, Value]) -> None:
    """Merges the frame of a body into the current one."""
    if tape is not None:
        tape.values = fold(tape.values, seen)


def absorb_scan(tape: Tape | None, seen: dict[Key, Value], scanned: frozenset[str]) -> None:
    """As `absorb`, for frames stacked by a scan: what was scanned over stays stacked."""
    whole = lambda key: key.sliced and key.path in scanned
    absorb(tape, {k: v if whole(k) else v.reduce_leading() for k, v in seen.items()})


def absorb_manual(tape: Tape | None, seen: dict[Key, Value]) -> dict[Key, Value]:
    """The frame of a shard_map body, reduced over the devices it varies on."""
    return {} if tape is None else {k: v.reduce_devices() for k, v in seen.items()}


def empty(tape: Tape | None, body: Callable[..., PyTree], *args: PyTree) -> dict[Key, Value]:
    """The frame that ``body(*args) -> (results, frame)`` will fill, before it has run."""
    if tape is None:
        return {}
    _, seen = jax.eval_shape(body, *args)
    return {k: v.identity() for k, v in seen.items()}


def align(tape: Tape | None, branches: Sequence[Callable], operands: Sequence[Value]) -> list:
    """Makes all branches ``(*operands) -> (results, frame)`` return the same frame."""
    if tape is None:
        return list(branches)
    union: dict[Key, Value] = {}
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
        sums: A tree of arrays that add up.
        lows: A tree of floating arrays of which the smallest entries count.
        highs: A tree of floating arrays of which the largest entries count.

    Example:
        >>> one = Reducible({"n": jnp.int32(2)}, highs={"top": jnp.float32(1)})
        >>> both = one.merge(Reducible({"n": jnp.int32(3)}, highs={"top": jnp.float32(4)}))
        >>> int(both.sums["n"]), float(both.highs["top"])
        (5, 4.0)
    """

    sums: dict[str, PyTree] = dataclasses.field(default_factory=dict)
    lows: dict[str, PyTree] = dataclasses.field(default_factory=dict)
    highs: dict[str, PyTree] = dataclasses.field(default_factory=dict)

    def _map(self, add: Callable, low: Callable, high: Callable, *rest: Value) -> "Reducible":
        return Reducible(
            jax.tree.map(add, self.sums, *(r.sums for r in rest)),
            jax.tree.map(low, self.lows, *(r.lows for r in rest)),
            jax.tree.map(high, self.highs, *(r.highs for r in rest)),
        )

    def merge(self, other: "Reducible") -> "Reducible":
        """Both together."""
        return self._map(jnp.add, jnp.minimum, jnp.maximum, other)

    def at_entry(self, number: jax.Array, sizes: tuple[int, ...], axis: int) -> "Reducible":
        """The observations of one entry of a stack of ``sizes``, beside entries that saw nothing.

        Args:
            number: Which entry, int32, row-major.
            sizes: The shape of the stack.
            axis: Where its axes go.
        """

        def put(nothing: float) -> Callable:
            def one(x: jax.Array) -> jax.Array:
                shape = (*x.shape[:axis], *sizes, *x.shape[axis:])
                here = jnp.arange(math.prod(sizes)).reshape(sizes) == number
                here = here.reshape((1,) * axis + sizes + (1,) * (x.ndim - axis))
                x = x.reshape(*x.shape[:axis], *[1] * len(sizes), *x.shape[axis:])
                return jnp.broadcast_to(jnp.where(here, x, jnp.asarray(nothing, x.dtype)), shape)

            return one

        return self._map(put(0), put(jnp.inf), put(-jnp.inf))

    def reduce_leading(self) -> "Reducible":
        """All entries of the leading axis together."""
        # Scans may have no steps, whose extremes are those of nothing.
        low = lambda x: x.min(0, initial=jnp.inf)
        return self._map(lambda x: x.sum(0), low, lambda x: x.max(0, initial=-jnp.inf))

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
        """The neutral element of merging."""
        full = lambda value: lambda x: jnp.full(x.shape, value, x.dtype)
        return self._map(full(0), full(jnp.inf), full(-jnp.inf))
