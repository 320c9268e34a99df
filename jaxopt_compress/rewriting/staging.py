"""Functions of parameters as one flat list of equations."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxopt_compress.lift._compat import bind, close, equation_scope, parts
from jaxopt_compress.typing import Leaf, PyTree, Value

_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
_DERIVATIVES = {
    "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr", "remat2": "jaxpr",
}  # fmt: skip
# What holds a function that is called once -> the name of its parameter.
CALLED = {**_INLINED, **_DERIVATIVES}


class Step(NamedTuple):
    """One equation, its operands and results numbered across inlined calls."""

    eqn: core.JaxprEqn
    inputs: tuple[Any, ...]  # an int, or a Literal
    outputs: tuple[int, ...]

    @property
    def out(self) -> Any:
        """The type of the first result."""
        return self.eqn.outvars[0].aval


class Staged(NamedTuple):
    """A function as equations; the first values are the leaves of the parameters."""

    steps: list[Step]
    constants: dict[int, Value]
    leaves: int
    arguments: list[Leaf]
    outputs: list[int | core.Literal]
    out_tree: PyTree


def stage(
    fn: Callable[..., PyTree], params: PyTree, args: tuple, kwargs: dict, *, forward: bool = False
) -> Staged:
    """Stages ``fn(params, *args, **kwargs)``; an argument that is no array stays static.

    ``forward`` also enters remat and functions with custom derivatives: to be read, not replayed.
    """
    inlined = CALLED if forward else _INLINED
    shapes, params_def = jax.tree.flatten(params)
    rest, rest_def = jax.tree.flatten((args, kwargs))
    arrays = [i for i, x in enumerate(rest) if hasattr(x, "shape")]
    out_tree = None

    def body(leaves: list[Value], values: list[Value]) -> list[Value]:
        nonlocal out_tree
        full = list(rest)
        for i, value in zip(arrays, values, strict=True):
            full[i] = value
        args, kwargs = jax.tree.unflatten(rest_def, full)
        out, out_tree = jax.tree.flatten(fn(params_def.unflatten(leaves), *args, **kwargs))
        return out

    arguments = [rest[i] for i in arrays]
    jaxpr, consts = parts(jax.make_jaxpr(body)(shapes, arguments))
    steps: list[Step] = []
    names: dict[core.Var, int] = {v: i for i, v in enumerate(jaxpr.invars)}
    count = len(names)
    constants = {}

    def new() -> int:
        nonlocal count
        count += 1
        return count - 1

    def inline(
        jaxpr: core.Jaxpr, consts: Sequence[Value], env: dict[core.Var, int | core.Literal]
    ) -> list[int | core.Literal]:
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            env[var] = new()
            constants[env[var]] = value

        def read(atom: core.Var | core.Literal) -> int | core.Literal:
            return atom if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            inputs = tuple(map(read, eqn.invars))
            inner = inlined.get(eqn.primitive.name)
            if inner:
                closed = close(eqn.params[inner])
                body, body_consts = parts(closed)
                results = inline(body, body_consts, dict(zip(body.invars, inputs, strict=True)))
            else:
                results = [new() for _ in eqn.outvars]
                steps.append(Step(eqn, inputs, tuple(results)))
            env.update(zip(eqn.outvars, results, strict=True))
        return list(map(read, jaxpr.outvars))

    outputs = inline(jaxpr, consts, dict(names))
    return Staged(steps, constants, len(shapes), arguments, outputs, out_tree)


def value_of(env: dict[int, Value], atom: int | core.Literal) -> Value:
    """The value of an operand."""
    return atom.val if isinstance(atom, core.Literal) else env[atom]


def run_step(env: dict[int, Value], step: Step) -> None:
    """Binds one equation and keeps its results."""
    with equation_scope(step.eqn):
        results = bind(step.eqn, [value_of(env, x) for x in step.inputs])
    env.update(zip(step.outputs, results, strict=True))


def shapes(tree: PyTree) -> PyTree:
    """The shapes and dtypes of a tree's leaves."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def along(vector: jax.Array, axis: int, rank: int) -> jax.Array:
    """A vector as an array of ``rank`` axes that broadcasts along ``axis``."""
    return vector.reshape([-1 if i == axis else 1 for i in range(rank)])
