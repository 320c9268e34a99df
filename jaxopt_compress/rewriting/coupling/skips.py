"""What a replay leaves out where whole parameters are zero, such as those of a residual block.

Their zeros are followed through the function as constants. A sum with a zero is its other operand,
a value that is a constant is not computed, and so nothing reads the parameters any more.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jax.extend import core

from jaxopt_compress.lift import _compat
from jaxopt_compress.rewriting.coupling.analysis import Analysis
from jaxopt_compress.rewriting.coupling.background import (
    ZERO,
    Background,
    Fills,
    Walk,
    backgrounds,
    uniform,
    unknown,
)
from jaxopt_compress.rewriting.coupling.constants import Known, is_zero
from jaxopt_compress.rewriting.coupling.control import INLINE
from jaxopt_compress.rewriting.coupling.coupling import NotRemovable
from jaxopt_compress.rewriting.coupling.equations import Body, Node
from jaxopt_compress.rewriting.coupling.replay import Kept, Skipped
from jaxopt_compress.typing import Leaf, Value

_ENTERED = (*INLINE, "remat2", "checkpoint")
_SUMS = ("add", "add_any")


class Skips(NamedTuple):
    """A function's bodies as they are evaluated, and which of its arguments are still read."""

    bodies: dict[Body, Skipped]
    read: list[bool]


def kept_without(found: Analysis, seeds: Iterable[int], emptied: Collection[str]) -> Kept:
    """Which indices are left, without some components and some whole parameters, by path.

    Raises:
        NotRemovable: Something that has to stay would go too, or a parameter is still read.
    """
    kept = Kept(found.coupling, found.coupling.close(seeds))
    if emptied:
        left = skips(found.body, kept, numbers(found, emptied))
        for path, read in zip(found.params, left.read, strict=False):
            if read and path in emptied:
                raise NotRemovable(
                    f"{path!r} cannot go as a whole: the function still reads it where it is 0"
                )
        kept.skips = left.bodies
    return kept


def numbers(found: Analysis, paths: Collection[str]) -> frozenset[int]:
    """The numbers of some parameters among the arguments of a body."""
    return frozenset(i for i, path in enumerate(found.params) if path in paths)


def skips(body: Body, kept: Kept, emptied: Collection[int]) -> Skips:
    """What is left out of a function some of whose arguments, by number, are zero everywhere."""
    start = [
        uniform(axes, ZERO) if i in emptied else unknown(axes) for i, axes in enumerate(body.ins)
    ]
    found: dict[Body, dict[core.Var, Background]] = {}
    backgrounds(body, Walk(kept, [], every=True, values=found), start)
    bodies: dict[Body, Skipped] = {}
    return Skips(bodies, _live(body, found, bodies))


def _live(
    body: Body, found: dict[Body, dict[core.Var, Background]], bodies: dict[Body, Skipped]
) -> list[bool]:
    """Fills ``bodies``, and says which arguments are read, from the end to the beginning."""
    own = {v: b.everywhere for v, b in found.get(body, {}).items()}
    given = {*body.jaxpr.invars, *body.jaxpr.constvars}
    known = {v: x for v, x in own.items() if isinstance(x, np.generic) and v not in given}
    skipped = bodies[body] = Skipped(known, set(), {}, set(), {})
    needed: set[core.Var] = set()

    def need(vs: Sequence[core.Var | core.Literal]) -> None:
        needed.update(v for v in vs if not isinstance(v, core.Literal) and v not in known)

    need(body.jaxpr.outvars)
    for node in reversed(body.nodes):
        if not needed.intersection(node.eqn.outvars) and not node.eqn.effects:
            skipped.dead.add(node)
            continue
        other = _other(node, own)
        if other is not None:
            skipped.forward[node] = other
            need([node.eqn.invars[other]])
        elif node.name in _ENTERED:
            read = _live(node.bodies[0], found, bodies)
            need([v for v, r in zip(node.eqn.invars, read, strict=True) if r])
            inner = bodies[node.bodies[0]]
            if inner.dead or inner.forward or inner.changed:
                skipped.changed.add(node)
        else:
            need(node.eqn.invars)
    return [v in needed for v in body.jaxpr.invars]


def _other(node: Node, everywhere: dict[core.Var, Known]) -> int | None:
    """The operand that a sum with zeros is equal to."""
    for i, v in enumerate(node.eqn.invars if node.name in _SUMS else ()):
        zero = not isinstance(v, core.Literal) and is_zero(everywhere.get(v))
        other, out = node.eqn.invars[1 - i], node.eqn.outvars[0]
        if zero and not isinstance(other, core.Literal) and _alike(other, out):
            return 1 - i
    return None


def _alike(v: Value, w: Leaf) -> bool:
    a, b = _compat.type_of(v), _compat.type_of(w)
    return a.shape == b.shape and a.dtype == b.dtype


def filled(body: Body, kept: Kept, fills: Fills) -> dict[Body, Skipped]:
    """What makes the whole function skip indices: where a maximum chooses, theirs are -inf."""
    found: dict[Body, Skipped] = {}

    def visit(body: Body) -> bool:
        made = {
            v: axes
            for node in body.nodes
            for v, axes in zip(node.eqn.outvars, node.outs, strict=True)
        }
        made.update(zip(body.jaxpr.invars, body.ins, strict=True))
        own = fills.get(body, {})
        fill = {v: [(k, ~kept.alive(made[v][k])) for k in sorted(own[v])] for v in own}
        changed = {node for node in body.nodes if any([visit(inner) for inner in node.bodies])}
        if fill or changed:
            found[body] = Skipped({}, set(), {}, changed, fill)
        return body in found

    visit(body)
    return found
