"""Replaying a staged function with compressed values in the place of dense ones.

A function is staged once to a jaxpr, as if its compressed arguments were dense. Replaying it binds
every equation that no compressed value reaches as it stands, and gives the others to a rule: one
small function per (primitive, type of compressed value). Where no rule applies the value is
materialized, and that is reported.
"""

import dataclasses
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var
from jax.extend.core import Literal as Constant

from jaxopt_compress.arrays import CompressedArray
from jaxopt_compress.lift import _compat
from jaxopt_compress.lift.segments import bind_run, last_uses
from jaxopt_compress.typing import PyTree, Value

OnFallback = Literal["warn", "error", "densify"]


class FallbackWarning(UserWarning):
    """A compressed array was materialized: no rule runs an operation on its stored form."""


class FallbackError(TypeError):
    """As `FallbackWarning`, where the caller asked for an error."""


class Layer(NamedTuple):
    """Which layer of a scanned stack a compressed value is.

    Attributes:
        stack: All of them, each field with one more axis in front.
        index: The number of this one, int32.
    """

    stack: Value
    index: jax.Array


class Turned(NamedTuple):
    """The array that a compressed value is a transpose of.

    Attributes:
        array: The array, before it was transposed.
        layer: The place of its fields in a stack, or None.
        order: As of `jax.lax.transpose`.
    """

    array: Value
    layer: Layer | None
    order: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Ref:
    """A compressed value on its way through a function, and the argument it came from.

    Attributes:
        array: The value.
        path: The path of the argument.
        layer: Its place in a stack, for kernels that read it there; or None.
        turned: The array it is a transpose of, for kernels that read that; or None. Lost where
            control flow takes the value in: it would be another operand.
    """

    array: Value
    path: str
    layer: Layer | None = None
    turned: Turned | None = None

    def replace(self, array: Value) -> "Ref":
        """Another value from the same argument."""
        new, old = jax.tree.leaves(array), jax.tree.leaves(self.array)
        untouched = len(new) == len(old) and all(map(operator.is_, new, old))
        return dataclasses.replace(self, array=array) if untouched else Ref(array, self.path)

    def alone(self) -> "Ref":
        """The same value without its place."""
        return Ref(self.array, self.path)


jax.tree_util.register_pytree_node(
    Ref,
    lambda ref: ((ref.array, ref.layer), ref.path),
    lambda path, fields: Ref(fields[0], path, fields[1]),
)


class Fallback(NamedTuple):
    """One materialization: which primitive, which argument, which line."""

    primitive: str
    path: str
    source: str


@dataclasses.dataclass
class Replay:
    """One run of a lifted function.

    Attributes:
        on_fallback: What happens when a compressed value has to be materialized.
        pallas: Whether products may run in kernels, which compilers cannot split over devices.
        fallbacks: Those that happened.
        tape: What observes uses and activations, if anything does.
        enclosing: The control-flow equations around the current one.
    """

    on_fallback: OnFallback = "warn"
    pallas: bool = False
    fallbacks: list[Fallback] = dataclasses.field(default_factory=list)
    tape: Any = None
    enclosing: tuple[JaxprEqn, ...] = ()

    def source_line(self, eqn: JaxprEqn) -> str:
        """The user's line that made ``eqn``; inside of JAX's own functions, that of their call."""
        lines = map(_compat.source_line, (eqn, *reversed(self.enclosing)))
        return next(filter(None, lines), "")

    def lose(self, eqn: JaxprEqn, ref: Ref) -> None:
        """Notes that observation ends at ``eqn``."""
        line = self.source_line(eqn)
        paths = getattr(ref.array, "paths", (ref.path,))
        self.fallbacks += [Fallback(eqn.primitive.name, path, line) for path in paths]

    def fall_back(self, eqn: JaxprEqn, ref: Ref) -> jax.Array:
        """Materializes ``ref`` for ``eqn``, and says so."""
        event = Fallback(eqn.primitive.name, ref.path, self.source_line(eqn))
        array = ref.array
        text = (
            f"{event.primitive!r} has no rule for the {type(array).__name__} {event.path!r} of "
            f"shape {array.shape} here and uses its dense form{array.lost_when_dense}, at "
            f"{event.source}"
        )
        if self.on_fallback == "error":
            raise FallbackError(
                f"{text}; materialize this leaf before the call, or pass on_fallback='densify'"
            )
        if self.on_fallback == "warn" and event not in self.fallbacks:
            warnings.warn(text, FallbackWarning, stacklevel=2)
        self.fallbacks.append(event)
        return array.materialize()


class Call(NamedTuple):
    """An equation, as its rule sees it.

    Attributes:
        eqn: The equation, staged with dense operands.
        replay: The run it is part of.
        operands: Arrays, and a `Ref` for each compressed operand.
    """

    eqn: JaxprEqn
    replay: Replay
    operands: list[Value]

    @property
    def params(self) -> dict[str, PyTree]:
        """The parameters of the equation."""
        return self.eqn.params

    @property
    def out(self) -> Value:
        """The type of the first result."""
        return self.eqn.outvars[0].aval

    def dense(self, keep: int | None = None) -> list[Value]:
        """The operands with every `Ref` but the one at ``keep`` materialized and reported."""
        fall_back = self.replay.fall_back
        return [
            fall_back(self.eqn, x) if isinstance(x, Ref) and i != keep else x
            for i, x in enumerate(self.operands)
        ]

    def others(self, keep: int) -> list[Value]:
        """As `dense`, with the compressed array itself at ``keep``."""
        values = self.dense(keep)
        values[keep] = values[keep].array
        return values


LeafRule = Callable[[Call, int], Value]
LEAF_RULES: dict[tuple[str, type], LeafRule] = {}
CONTROL_RULES: dict[str, Callable[[Call], list[Value]]] = {}


def leaf_rule(primitives: str, *types: type) -> Callable[[LeafRule], LeafRule]:
    """Registers how primitives, named in one string, execute on compressed arrays of some types.

    The rule gets the call and the position of the compressed operand, and returns an array, a
    compressed array, or NotImplemented where it does not apply.
    """

    def register(rule: LeafRule) -> LeafRule:
        LEAF_RULES.update({(name, t): rule for name in primitives.split() for t in types})
        return rule

    return register


def control_rule(*primitives: str):
    """Registers how primitives that hold jaxprs are rebuilt around a replay of them.

    The rule returns the results, a `Ref` for each compressed one.
    """

    def register(rule):
        CONTROL_RULES.update({name: rule for name in primitives})
        return rule

    return register


def replay_jaxpr(replay: Replay, closed: ClosedJaxpr | Jaxpr, args: Sequence[Value]) -> list[Value]:
    """Evaluates a jaxpr on arrays and `Ref`s."""
    jaxpr, consts = _compat.parts(closed)
    env: dict[Var, Value] = {}
    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    read = lambda v: v.val if isinstance(v, Constant) else env[v]
    last, origin = last_uses(jaxpr), _compat.call_origin(jaxpr)
    run: list[JaxprEqn] = []  # equations that wait to be bound at once
    for i, eqn in enumerate(jaxpr.eqns):
        values = [v.val if isinstance(v, Constant) else env.get(v) for v in eqn.invars]
        if not any(isinstance(x, Ref) for x in values):
            run.append(eqn)
            continue
        # A view of a weight needs nothing that waits, and does not cut the run in two.
        if eqn.effects or any(isinstance(v, Var) and v not in env for v in eqn.invars):
            bind_run(run, env, last, i, origin)
            run = []
        operands = [read(v) for v in eqn.invars]
        with _compat.equation_scope(eqn):
            results = replay_equation(Call(eqn, replay, operands))
        env.update(zip(eqn.outvars, results, strict=True))
    bind_run(run, env, last, len(jaxpr.eqns), origin)
    return [read(v) for v in jaxpr.outvars]


def replay_equation(call: Call) -> list[Value]:
    """The results of an equation, a `Ref` for each compressed one."""
    name = call.eqn.primitive.name
    if name in CONTROL_RULES:
        outer = call.replay.enclosing
        call.replay.enclosing = (*outer, call.eqn)
        try:
            return CONTROL_RULES[name](call)
        finally:
            call.replay.enclosing = outer
    for i, x in enumerate(call.operands):
        rule = LEAF_RULES.get((name, type(x.array))) if isinstance(x, Ref) else None
        if rule is None:
            continue
        result = rule(call, i)
        if result is NotImplemented:
            continue
        results = result if isinstance(result, list) else [result]
        if call.replay.tape is not None and not any(
            isinstance(y, CompressedArray) for y in results
        ):
            call.replay.lose(call.eqn, x)
        wrap = lambda y, x=x: x.replace(y) if isinstance(y, CompressedArray) else y
        return [wrap(y) for y in results]
    return _compat.bind(call.eqn, call.dense())
