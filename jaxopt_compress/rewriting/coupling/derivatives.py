"""Functions with derivatives of their own, which stay theirs on smaller operands."""

import dataclasses
from collections.abc import Sequence

import jax

from jaxopt_compress.lift import _compat
from jaxopt_compress.rewriting.coupling.equations import Node, replays
from jaxopt_compress.rewriting.coupling.replay import Gone, Kept, run, run_without
from jaxopt_compress.typing import PyTree, Value


def _types(values: Sequence[Value], gone: Sequence[Gone]) -> list[jax.ShapeDtypeStruct]:
    """The types of operands as they were before indices were removed."""
    shape = lambda flags: tuple(map(len, flags))
    return [
        _compat.varying_type(shape(flags), jax.typeof(x).dtype, [jax.typeof(x)])
        for x, flags in zip(values, gone, strict=True)
    ]


@replays("custom_jvp_call")
def _jvp(kept: Kept, node: Node, values: list[Value]) -> list[Value]:
    """Stages the rule for whole operands, where something is differentiated, and replays it."""
    gone = list(map(kept.gone, node.ins))
    fn = jax.custom_jvp(lambda *operands: run(node.bodies[0], kept, operands))

    def rule(primals: PyTree, tangents: PyTree) -> tuple[PyTree, PyTree]:
        whole = _types(primals, gone), _types(tangents, gone)
        push = lambda x, t: jax.jvp(lambda *a: _compat.bind(node.eqn, a), tuple(x), tuple(t))
        staged = jax.make_jaxpr(push)(*whole)
        results, _ = run_without(staged, [*gone, *gone], [*primals, *tangents])
        half = len(results) // 2
        return results[:half], results[half:]

    fn.defjvp(rule)
    return list(fn(*values))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Pull:
    """The backward pass of a rule, for whole operands: what its residuals have lost, and it."""

    gone: list[Gone]
    types: list[jax.ShapeDtypeStruct]
    tree: PyTree


@replays("custom_vjp_call")
def _vjp(kept: Kept, node: Node, values: list[Value]) -> list[Value]:
    """As for forward mode, with the residuals of the rule between its two halves."""
    gone, gone_out = list(map(kept.gone, node.ins)), list(map(kept.gone, node.outs))
    # Arrays that the function closes over come first, and have no derivatives.
    fixed = node.params.get("num_consts", 0)
    fn = jax.custom_vjp(lambda *operands: run(node.bodies[0], kept, operands))

    def forward(*operands: Value) -> tuple[PyTree, PyTree]:
        tree = None

        def push(whole: list[Value]) -> tuple[PyTree, PyTree]:
            nonlocal tree
            call = lambda *rest: _compat.bind(node.eqn, [*whole[:fixed], *rest])
            results, pull = jax.vjp(call, *whole[fixed:])
            residuals, tree = jax.tree.flatten(pull)
            return results, residuals

        staged, shapes = jax.make_jaxpr(push, return_shape=True)(_types(operands, gone))
        results, lost = run_without(staged, gone, operands)
        n = len(node.outs)
        return results[:n], (results[n:], _Pull(lost[n:], shapes[1], tree))

    def backward(
        kept_back: tuple[list[Value], _Pull], cotangents: list[Value]
    ) -> tuple[Value, ...]:
        residuals, pull = kept_back
        whole = pull.types, _types(cotangents, gone_out)
        back = lambda r, ct: pull.tree.unflatten(r)(ct)
        staged = jax.make_jaxpr(back)(*whole)
        results, _ = run_without(staged, [*pull.gone, *gone_out], [*residuals, *cotangents])
        return (*(None,) * fixed, *results)

    fn.defvjp(forward, backward)
    return list(fn(*values))
