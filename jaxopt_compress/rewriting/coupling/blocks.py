"""Residual blocks that are written out: sums ``x + f(x)``, and the parameters of ``f`` alone.

A parameter is that of ``f`` alone if all its influence on the results passes ``f(x)``: in the graph
of values, from the parameter to the results, ``f(x)`` is on every path (it dominates, seen from the
results).
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from jax.extend import core

from jaxopt_compress.rewriting.coupling.analysis import Analysis
from jaxopt_compress.rewriting.coupling.control import CALLS, DERIVATIVES
from jaxopt_compress.rewriting.coupling.equations import Body, shape_of
from jaxopt_compress.typing import Value

_SUMS = ("add", "add_any")
_SAME = ("copy", "convert_element_type", "name", "optimization_barrier", "sharding_constraint")
_END = -1


class Step(NamedTuple):
    """An equation with its operands and results as numbers, called functions being entered."""

    name: str
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]


def residual_blocks(found: Analysis, free: Collection[str], ends: Sequence[bool]) -> list[set[str]]:
    """The parameters of each ``f`` of a sum ``x + f(x)``, in the order of the sums.

    Scalars, such as a gate of ``x + a f(x)``, have no entries that could go: they are left out.

    Args:
        found: A staged function.
        free: The parameters that may go; a block with another one is none.
        ends: For each result, whether it counts as one.
    """
    count = iter(range(10**9))
    steps: list[Step] = []
    numbers = [next(count) for _ in found.body.ins]
    outs = _steps(found.body, numbers, count, steps)
    after = _dominators(steps, [v for v, end in zip(outs, ends, strict=True) if end])
    makers = {v: step for step in steps for v in step.outs}
    sums = [s for s in steps if s.name in _SUMS and s.shapes[0] == s.shapes[1]]
    streams = {s: [_terms(v, makers) for v in s.ins] for s in sums}
    above = _above(steps, {v for pair in streams.values() for terms in pair for v in terms})
    # The parameters that a value is on every path of.
    own: dict[int, set[str]] = defaultdict(set)
    inputs = zip(found.params, numbers, found.body.ins, strict=False)
    for path, v in ((path, v) for path, v, axes in inputs if axes):
        while (v := after.get(v, _END)) != _END:
            own[v].add(path)
    blocks: list[set[str]] = []
    for s in sums:
        for x, f in ((0, 1), (1, 0)):
            params = own.get(s.ins[f], set())
            residual = any(v in above.get(s.ins[f], ()) for v in streams[s][x])
            if params and params <= set(free) and residual and params not in blocks:
                blocks.append(params)
    return blocks


def _steps(body: Body, ins: list[int], count: Iterator[int], steps: list[Step]) -> list[int]:
    """Appends the equations of a function, and returns its results."""
    env: dict[core.Var, int] = dict(zip(body.jaxpr.invars, ins, strict=True))

    def read(v: Value) -> int:
        if isinstance(v, core.Literal) or v not in env:
            return next(count)  # a constant
        return env[v]

    for node in body.nodes:
        given = [read(v) for v in node.eqn.invars]
        if node.name in (*CALLS, *DERIVATIVES):
            outs = _steps(node.bodies[0], given, count, steps)
        else:
            outs = [next(count) for _ in node.eqn.outvars]
            shapes = tuple(map(shape_of, node.eqn.invars))
            steps.append(Step(node.name, tuple(given), tuple(outs), shapes))
        env.update(zip(node.eqn.outvars, outs, strict=True))
    return [read(v) for v in body.jaxpr.outvars]


def _dominators(steps: list[Step], outs: list[int]) -> dict[int, int]:
    """Value -> the next one that is on all of its paths to the results; `_END` if none is.

    Values that reach no result are not there. (Cooper et al., 2001, A Simple, Fast Dominance
    Algorithm; one pass, since there are no cycles.)
    """
    after: dict[int, int] = dict.fromkeys(outs, _END)
    depth = {_END: 0, **dict.fromkeys(outs, 1)}

    def meet(a: int, b: int) -> int:
        while a != b:
            if depth[a] < depth[b]:
                a, b = b, a
            a = after[a]
        return a

    for step in reversed(steps):
        reached = [v for v in step.outs if v in after]
        if not reached:
            continue
        to = reached[0]
        for v in reached[1:]:
            to = meet(to, v)
        for v in step.ins:
            after[v] = to if v not in after else meet(after[v], to)
            depth[v] = depth[after[v]] + 1
    return after


def _terms(v: int, makers: dict[int, Step]) -> set[int]:
    """A value, and all that it is a sum of."""
    found, rest = set(), [v]
    while rest:
        v = rest.pop()
        if v not in found:
            found.add(v)
            step = makers.get(v)
            if step is not None and step.name in (*_SUMS, *_SAME):
                rest += step.ins
    return found


def _above(steps: list[Step], some: set[int]) -> dict[int, set[int]]:
    """Value -> those of some values that it is computed from, itself included."""
    found: dict[int, set[int]] = {}
    for step in steps:
        above = set().union(*(found.get(v, set()) | ({v} & some) for v in step.ins))
        found.update((v, above | ({v} & some)) for v in step.outs)
    return found
