"""Running a function without some indices of its values."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.lift import _compat
from jaxopt_compress.rewriting.coupling.coupling import Coupling, NotRemovable
from jaxopt_compress.rewriting.coupling.equations import REPLAY, Body, Node, build
from jaxopt_compress.rewriting.coupling.graph import Axes, Axis, Graph
from jaxopt_compress.rewriting.coupling.lanes import Lanes
from jaxopt_compress.rewriting.coupling.shapes import take
from jaxopt_compress.typing import Value

Gone = tuple[np.ndarray, ...]  # per axis of a value, booleans, true where an index is removed


class Skipped(NamedTuple):
    """What the evaluation of one body leaves out, or fills.

    Attributes:
        known: The values that are one constant, which are not computed.
        dead: The equations that nothing reads.
        forward: The sums with zeros, and the number of the operand that they are equal to.
        changed: The calls of functions of which something is left out, or filled.
        fill: The values that are -inf at some indices: their axes, and flags of these indices.
    """

    known: dict[core.Var, Value]
    dead: set[Node]
    forward: dict[Node, int]
    changed: set[Node]
    fill: dict[core.Var, list[tuple[int, np.ndarray]]]


_WHOLE = Skipped({}, set(), {}, set(), {})


class Kept:
    """Which indices are left; the axes that it is asked for are those of a graph's bodies.

    Attributes:
        lanes: What sums over removed indices have to add; nothing, unless it is set.
        skips: What is left out of bodies; nothing, unless it is set.
    """

    def __init__(self, coupling: Coupling, gone: np.ndarray):
        """The replay of a solved graph, with flags of the components that are removed."""
        self._gone = gone[coupling.component]
        self._sizes: dict[int, int] = {}
        self._touched: dict[Node, bool] = {}
        self.lanes = Lanes(self, {})
        self.skips: dict[Body, Skipped] = {}

    def alive(self, axis: Axis) -> np.ndarray:
        """Flags of the indices that are left."""
        return ~self._gone[axis]

    def size(self, axis: Axis) -> int:
        """How many are left."""
        key = id(axis)
        if axis.base is not None or key not in self._sizes:
            # Views made on the way are not kept alive by anything, and their ids come again.
            n = len(axis) - int(self._gone[axis].sum())
            if axis.base is not None:
                return n
            self._sizes[key] = n
        return self._sizes[key]

    def shape(self, axes: Axes) -> tuple[int, ...]:
        """The shape that is left of a value."""
        return tuple(map(self.size, axes))

    def shrinks(self, axes: Axes) -> bool:
        """Whether a value loses an index."""
        return any(self.size(a) < len(a) for a in axes)

    def gone(self, axes: Axes) -> Gone:
        """Flags of the indices that a value loses."""
        return tuple(self._gone[a] for a in axes)

    def cut(self, x: Value, axes: Axes) -> Value:
        """What is left of a whole value."""
        return cut(x, self.gone(axes)) if self.shrinks(axes) else x

    def cut_constant(self, x: Value, axes: Axes) -> Value:
        """What is left of a constant, which is not staged as an operation where it need not be."""
        if is_traced(x):
            return self.cut(x, axes)
        with jax.ensure_compile_time_eval():
            return self.cut(x, axes)

    def touches(self, node: Node) -> bool:
        """Whether an equation meets anything smaller."""
        if node not in self._touched:
            self._touched[node] = any(map(self.shrinks, (*node.ins, *node.outs))) or any(
                any(map(self.shrinks, body.constant_axes)) or any(map(self.touches, body.nodes))
                for body in node.bodies
            )
        return self._touched[node]


def cut(x: Value, gone: Gone) -> Value:
    """What is left of a whole value."""
    for k, flags in enumerate(gone):
        if flags.any():
            x = take(jax.numpy.asarray(x), np.flatnonzero(~flags), k)
    return x


def run(body: Body, kept: Kept, args: Sequence[Value]) -> list[Value]:
    """Evaluates a function on operands without the removed indices.

    Equations that meet whole operands only are bound as they stand, with their custom derivatives
    and shardings; others are bound to the smaller operands, by their rule if they have one.
    """
    jaxpr = body.jaxpr
    constants = map(kept.cut_constant, body.constants, body.constant_axes)
    env: dict[core.Var, Value] = dict(zip(jaxpr.constvars, constants, strict=True))
    skipped = kept.skips.get(body, _WHOLE)
    filled = lambda vs, xs: {
        v: _filled(x, skipped.fill.get(v, ())) for v, x in zip(vs, xs, strict=True)
    }
    env.update(filled(jaxpr.invars, args))
    kept.lanes.enter(body, env)

    def read(v: core.Var | core.Literal, axes: Axes) -> Value:
        if isinstance(v, core.Literal):
            return v.val
        if v in skipped.known or (skipped is not _WHOLE and v not in env):
            # What is not there is an operand of a call that does not read it.
            known = skipped.known.get(v, 0)
            return jnp.full(kept.shape(axes), known, _compat.type_of(v).dtype)
        return env[v]

    for node in body.nodes:
        if node in skipped.dead:
            continue
        if node in skipped.forward:
            i = skipped.forward[node]
            env[node.eqn.outvars[0]] = read(node.eqn.invars[i], node.ins[i])
            continue
        values = [read(v, axes) for v, axes in zip(node.eqn.invars, node.ins, strict=True)]
        with _compat.equation_scope(node.eqn):
            if node not in skipped.changed and not kept.touches(node):
                results = _compat.bind(node.eqn, values)
            elif node.whole:
                results = map(kept.cut, _compat.bind(node.eqn, values), node.outs)
            elif node.name in REPLAY:
                results = REPLAY[node.name](kept, node, values)
            else:
                results = _compat.bind(node.eqn, values)
            if node.name == "reduce_sum":
                results = [kept.lanes.summed(body, node, *results)]
        env.update(filled(node.eqn.outvars, results))
    return [read(v, axes) for v, axes in zip(jaxpr.outvars, body.outs, strict=True)]


def _filled(x: Value, fills: Sequence[tuple[int, np.ndarray]]) -> Value:
    for k, flags in fills:
        shape = [-1 if i == k else 1 for i in range(jnp.ndim(x))]
        x = jnp.where(flags.reshape(shape), jnp.asarray(-jnp.inf, x.dtype), x)
    return x


def run_without(
    jaxpr: core.ClosedJaxpr, gone: Sequence[Gone], args: Sequence[Value]
) -> tuple[list, list[Gone]]:
    """Evaluates a jaxpr of whole operands on operands without some indices.

    Args:
        jaxpr: Staged for whole operands.
        gone: What each operand has lost.
        args: The operands that are left.

    Returns:
        The results that are left, and what each has lost.

    Raises:
        NotRemovable: More than that would have to go.
    """
    graph = Graph()
    ins = [graph.axes(tuple(map(len, flags))) for flags in gone]
    body = build(graph, jaxpr, ins)
    coupling = Coupling(graph)
    pairs = [
        (a, f)
        for axes, flags in zip(ins, gone, strict=True)
        for a, f in zip(axes, flags, strict=True)
    ]
    seeds = {x for axis, flags in pairs for x in coupling.component[axis[flags]].tolist()}
    kept = Kept(coupling, coupling.close(seeds))
    if any(not np.array_equal(~kept.alive(axis), flags) for axis, flags in pairs):
        raise NotRemovable("a rule for derivatives couples more indices than its function does")
    return run(body, kept, args), [kept.gone(axes) for axes in body.outs]
