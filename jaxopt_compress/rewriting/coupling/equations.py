"""A function as equations whose values carry atoms, and the table of rules for primitives."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.lift import _compat
from jaxopt_compress.rewriting.coupling.graph import Axes, Axis, Graph
from jaxopt_compress.typing import PyTree, Value

_LARGEST_CONSTANT = 2**20  # entries; larger index arrays are taken for data


@dataclasses.dataclass(eq=False)
class Node:
    """One equation, where it stands; called functions have nodes of their own for each call.

    Attributes:
        eqn: The equation.
        ins: The axes of its operands.
        outs: The axes of its results.
        known: Its operands, as far as they follow from constants.
        bodies: The functions that it calls.
        whole: Whether it is computed as it stands, and its results are cut afterwards.
        line: The user's line that made it; inside of JAX's own functions, that of their call.
        notes: What its rule has found out for the replay.
    """

    eqn: core.JaxprEqn
    ins: list[Axes]
    outs: list[Axes] = dataclasses.field(default_factory=list)
    known: list["Constant | None"] = dataclasses.field(default_factory=list)
    bodies: list["Body"] = dataclasses.field(default_factory=list)
    whole: bool = False
    line: str = ""
    notes: dict[str, Value] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the primitive."""
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, PyTree]:
        """The parameters of the primitive."""
        return self.eqn.params

    def out_shape(self, i: int = 0) -> tuple[int, ...]:
        """The shape of a result."""
        return shape_of(self.eqn.outvars[i])

    def where(self) -> str:
        """How errors name it."""
        return f"{self.name} at {self.line}" if self.line else self.name


@dataclasses.dataclass(eq=False)
class Body:
    """A function with the axes of all of its values."""

    jaxpr: core.Jaxpr
    constants: list[Value]
    constant_axes: list[Axes]
    ins: list[Axes]
    nodes: list[Node]
    outs: list[Axes]
    known_outs: list["Constant | None"]

    def walk(self) -> Iterator[Node]:
        """All nodes, those of called functions included."""
        for node in self.nodes:
            yield node
            for body in node.bodies:
                yield from body.walk()

    def every_axis(self) -> list[Axis]:
        """Each axis of each value once."""
        found: dict[int, Axis] = {}

        def add(values: Sequence[Axes]) -> None:
            found.update((id(a), a) for axes in values for a in axes)

        add([*self.ins, *self.constant_axes])
        for node in self.walk():
            add([*node.ins, *node.outs])
            for body in node.bodies:
                add([*body.ins, *body.constant_axes])
        return list(found.values())


class Constant:
    """A value that depends on no argument; computed when it is asked for."""

    def __init__(self, compute: Callable[[], np.ndarray]):
        self._compute: Callable[[], np.ndarray] | None = compute
        self._value: Any = None

    @property
    def value(self) -> np.ndarray:
        """The value."""
        if self._compute is not None:
            self._value, self._compute = self._compute(), None
        return self._value


Couple = Callable[[Graph, Node], list[Axes] | None]
Replay = Callable[[Any, Node, list[Value]], list[Value]]
COUPLE: dict[str, Couple] = {}
REPLAY: dict[str, Replay] = {}


def couples(*names: str) -> Callable[[Couple], Couple]:
    """Registers how primitives couple their axes: ``rule(graph, node) -> axes of the results``.

    None stands for "as an operation without a rule".
    """

    def register(rule: Couple) -> Couple:
        COUPLE.update(dict.fromkeys(names, rule))
        return rule

    return register


def replays(*names: str) -> Callable[[Replay], Replay]:
    """Registers how primitives run on smaller operands: ``rule(kept, node, values) -> results``.

    Others are bound as they stand: none of their parameters says a shape.
    """

    def register(rule: Replay) -> Replay:
        REPLAY.update(dict.fromkeys(names, rule))
        return rule

    return register


def shape_of(v: Value) -> tuple[int, ...]:
    """The shape of a variable or literal; that of tokens and the like is ()."""
    return tuple(getattr(_compat.type_of(v), "shape", ()))


def opaque(graph: Graph, node: Node) -> list[Axes]:
    """An operation without a rule: operands stay whole, results may be cut afterwards."""
    for axes in node.ins:
        graph.protect(axes, f"it is an operand of {node.where()}, of which nothing is known")
    node.whole = True
    return [graph.axes(shape_of(v)) for v in node.eqn.outvars]


def build(
    graph: Graph,
    jaxpr: Any,
    ins: Sequence[Axes],
    known: Sequence[Constant | None] | None = None,
    line: str = "",
) -> Body:
    """Walks a jaxpr, and tells the graph what each equation says of its axes.

    Args:
        graph: What is told.
        jaxpr: Open or closed.
        ins: The axes of its arguments.
        known: The arguments that are constants, by position; None for the others.
        line: The line to name for equations without one of their own.
    """
    jaxpr, consts = _compat.parts(jaxpr)
    constant_axes = [graph.axes(np.shape(c)) for c in consts]
    env: dict[core.Var, Axes] = dict(zip(jaxpr.constvars, constant_axes, strict=True))
    env.update(zip(jaxpr.invars, ins, strict=True))
    values: dict[core.Var, Constant] = {
        v: Constant(lambda c=c: np.asarray(c))
        for v, c in zip(jaxpr.constvars, consts, strict=True)
        if not is_traced(c) and np.size(c) <= _LARGEST_CONSTANT
    }
    values.update({v: c for v, c in zip(jaxpr.invars, known or (), strict=False) if c is not None})

    def read(v: Value) -> Axes:
        return graph.axes(np.shape(v.val)) if isinstance(v, core.Literal) else env[v]

    def constant(v: Value) -> Constant | None:
        if isinstance(v, core.Literal):
            return Constant(lambda: np.asarray(v.val))
        return values.get(v)

    nodes = []
    for eqn in jaxpr.eqns:
        node = Node(eqn, [read(v) for v in eqn.invars], line=_compat.source_line(eqn) or line)
        node.known = [constant(v) for v in eqn.invars]
        outs = COUPLE.get(node.name, opaque)(graph, node)
        node.outs = opaque(graph, node) if outs is None else outs
        env.update(zip(eqn.outvars, node.outs, strict=True))
        values.update(_fold(node))
        nodes.append(node)
    outs = [read(v) for v in jaxpr.outvars]
    known_outs = [constant(v) for v in jaxpr.outvars]
    return Body(jaxpr, list(consts), constant_axes, list(ins), nodes, outs, known_outs)


def _fold(node: Node) -> dict[core.Var, Constant]:
    """The results of an equation that follow from constants."""
    eqn = node.eqn
    if len(node.bodies) == 1 and len(node.bodies[0].known_outs) == len(eqn.outvars):
        # A call; loops and branches have results that are none of their bodies'.
        found = node.bodies[0].known_outs if node.notes.get("inlined") else []
        return {v: c for v, c in zip(eqn.outvars, found, strict=False) if c is not None}
    small = all(np.prod(shape_of(v), dtype=int) <= _LARGEST_CONSTANT for v in eqn.outvars)
    if node.bodies or node.whole or not small or len(eqn.outvars) != 1:
        return {}
    operands = [c for c in node.known if c is not None]
    if len(operands) < len(node.known):
        return {}

    def compute() -> np.ndarray:
        with jax.ensure_compile_time_eval():
            values = [jax.numpy.asarray(c.value) for c in operands]
            return np.asarray(_compat.bind(eqn, values)[0])

    return {eqn.outvars[0]: Constant(compute)}
