"""The values of a march: one for each batch, or a parameter that has not been decided yet."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxopt_compress.lift import _compat
from jaxopt_compress.lift.interpreter import JaxprEqn
from jaxopt_compress.lift.observe.probe import Axis, Member

Index = tuple[int, ...]


@dataclasses.dataclass
class Each:
    """A value that differs between batches: one entry per batch."""

    values: list[Any]


@dataclasses.dataclass(eq=False)
class Weight:
    """A value that is made from parameters alone, and changes when they are decided.

    Attributes:
        now: Computes it from the present parameters.
        bases: Path -> the entry of the stack that it is made from; ``()`` for a whole parameter.
        members: What its axes hold of each parameter, or () where that is not known.
        ndim: Its rank.
    """

    now: Callable[[], Any]
    bases: Mapping[str, Index]
    members: tuple[Member, ...]
    ndim: int

    def layer(self, t: int) -> "Weight | None":
        """The entry ``t`` of the leading axis, if that is the leading stack axis of each member."""
        if not self.members or any(not self._stacked(m) for m in self.members):
            return None
        bases = {path: (*index, t) for path, index in self.bases.items()}
        return Weight(lambda: self.now()[t], bases, self.members, self.ndim - 1)

    def _stacked(self, member: Member) -> bool:
        axis = member.axes[len(member.axes) - self.ndim]
        first = len(self.bases[member.path]) - len(member.shape)
        return axis == Axis((first,))


def present(x: Any, batch: int) -> Any:
    """The value for one batch."""
    if isinstance(x, Each):
        return x.values[batch]
    return x.now() if isinstance(x, Weight) else x


def derived(
    eqn: JaxprEqn, operands: Sequence[Any], members: Sequence[tuple[Member, ...]]
) -> list[Weight]:
    """The results of an equation of parameters and constants alone."""
    bases = {k: v for x in operands if isinstance(x, Weight) for k, v in x.bases.items()}

    def now(i: int) -> Callable[[], Any]:
        return lambda: _compat.bind(eqn, [present(x, 0) for x in operands])[i]

    return [
        Weight(now(i), _indexed(bases, own), own, len(getattr(v.aval, "shape", ())))
        for i, (v, own) in enumerate(zip(eqn.outvars, members, strict=True))
    ]


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


def stacked(values: Sequence[Any], count: int) -> Any:
    """The values of the steps of a loop along a new leading axis."""
    if not any(isinstance(x, Each) for x in values):
        return jax.numpy.stack([present(x, 0) for x in values])
    return Each([jax.numpy.stack([present(x, b) for x in values]) for b in range(count)])
