"""The values of a march: one for each batch, or a parameter that has not been decided yet."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax

from jaxopt_compress.lift import _compat
from jaxopt_compress.lift.interpreter import Call, JaxprEqn, Ref, Replay, replay_equation
from jaxopt_compress.lift.observe.probe import Axis, Member, Probe
from jaxopt_compress.lift.observe.tape import Tape
from jaxopt_compress.typing import Value

Index = tuple[int, ...]


@dataclasses.dataclass
class Each:
    """A value that differs between batches: one entry per batch."""

    values: list[Value]


@dataclasses.dataclass(eq=False)
class Weight:
    """A value that is made from parameters, and changes when they are decided.

    Attributes:
        now: ``now(batch)`` computes it from the present parameters.
        bases: Path -> the entry of the stack that it is made from; ``()`` for a whole parameter.
        members: What its axes hold of each parameter, or () where that is not known.
        ndim: Its rank.
        each: Whether it differs between batches, which choose entries of a parameter.
        entries: ``entries(batch)``: as of a `Probe`; None if it holds none.
    """

    now: Callable[[int], Value]
    bases: Mapping[str, Index]
    members: tuple[Member, ...]
    ndim: int
    each: bool = False
    entries: Callable[[int], Value] | None = None

    def layer(self, t: int) -> "Weight | None":
        """The entry ``t`` of the leading axis, if that is the leading stack axis of each member."""
        if not self.members or any(not self._stacked(m) for m in self.members):
            return None
        bases = {path: (*index, t) for path, index in self.bases.items()}
        entries = self.entries
        cut = None if entries is None else lambda b: entries(b)[t]
        now = lambda b: self.now(b)[t]
        return Weight(now, bases, self.members, self.ndim - 1, self.each, cut)

    def computed(self, count: int) -> Value:
        """The present value; one for each batch if they differ."""
        return Each([self.now(b) for b in range(count)]) if self.each else self.now(0)

    def _stacked(self, member: Member) -> bool:
        axis = member.axes[len(member.axes) - self.ndim]
        first = len(self.bases[member.path]) - len(member.shape)
        return axis == Axis((first,))


def present(x: Value, batch: int) -> Value:
    """The value for one batch."""
    if isinstance(x, Each):
        return x.values[batch]
    return x.now(batch) if isinstance(x, Weight) else x


def computed(x: Value, count: int) -> Value:
    """A value, computed now if it is a `Weight`."""
    return x.computed(count) if isinstance(x, Weight) else x


def derived(
    eqn: JaxprEqn, operands: Sequence[Value], members: Sequence[tuple[Member, ...]]
) -> list[Weight]:
    """The results of an equation of parameters and constants alone, or of a lookup in parameters.

    Args:
        eqn: The equation.
        operands: Its operands.
        members: For each result, what it holds of parameters.
    """
    bases = {k: v for x in operands if isinstance(x, Weight) for k, v in x.bases.items()}
    depends = any(isinstance(x, Each) or (isinstance(x, Weight) and x.each) for x in operands)

    def now(i: int) -> Callable[[int], Value]:
        return lambda b: _compat.bind(eqn, [present(x, b) for x in operands])[i]

    def entries(i: int) -> Callable[[int], Value]:
        return lambda b: (
            replayed(eqn, operands, b, Tape(lambda tape, meeting: None))[i].array.entries
        )

    return [
        Weight(
            now(i),
            _indexed(bases, own),
            own,
            len(getattr(v.aval, "shape", ())),
            depends,
            entries(i) if any(m.looked_up for m in own) else None,
        )
        for i, (v, own) in enumerate(zip(eqn.outvars, members, strict=True))
    ]


def replayed(eqn: JaxprEqn, operands: Sequence[Value], batch: int, tape: Tape) -> list[Value]:
    """Runs an equation on the values of one batch, with probes in the place of parameters."""
    values = [present(x, batch) for x in operands]
    numbers = [entries_of(x, batch) for x in operands]
    return replayed_on(eqn, operands, values, numbers, tape)


def entries_of(x: Value, batch: int) -> Value:
    """Which entries of a parameter a value has, if batches choose them."""
    return x.entries(batch) if isinstance(x, Weight) and x.entries is not None else None


def replayed_on(
    eqn: JaxprEqn,
    operands: Sequence[Value],
    values: Sequence[Value],
    entries: Sequence[Value],
    tape: Tape,
) -> list[Value]:
    """As `replayed`, on values and entries that may be traced."""
    probed = [
        Ref(Probe(v, x.members, e), "") if isinstance(x, Weight) and x.members else v
        for x, v, e in zip(operands, values, entries, strict=True)
    ]
    return replay_equation(Call(eqn, Replay("densify", tape=tape), probed))


def _indexed(bases: Mapping[str, Index], members: Sequence[Member]) -> dict[str, Index]:
    """The entries of stacks that are known after an index such as ``w[1]``."""
    found = dict(bases)
    for m in members:
        first = -len(m.shape)
        known = {first + i: t for i, t in enumerate(bases[m.path])} | dict(m.taken)
        lead = next(i for i in range(len(m.shape) + 1) if first + i not in known)
        if len(known) > lead:
            raise ValueError(
                f"{m.path!r} of shape {m.shape} is indexed along axes {sorted(known)}, which are "
                "not its leading ones: it cannot be decided entry by entry; use calibrate and "
                "compress"
            )
        found[m.path] = tuple(known[first + i] for i in range(lead))
    return found


def stacked(values: Sequence[Value], count: int) -> Value:
    """The values of the steps of a loop along a new leading axis."""
    if not any(isinstance(x, Each) for x in values):
        return jax.numpy.stack([present(x, 0) for x in values])
    return Each([jax.numpy.stack([present(x, b) for x in values]) for b in range(count)])
