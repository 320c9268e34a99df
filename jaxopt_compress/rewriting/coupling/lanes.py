"""One of the removed indices, where all of them have the same value, for sums over them."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxopt_compress.lift import _compat
from jaxopt_compress.rewriting.coupling.constants import LANE
from jaxopt_compress.rewriting.coupling.equations import Body, Node
from jaxopt_compress.typing import Value


class Lanes:
    """The values of a replay, of which lanes are made when a sum asks for them.

    A lane is a value with length 1 in place of an axis of which indices were removed: the value
    that it has at each of these in the masked function.
    """

    def __init__(self, kept: Any, operands: dict[Node, list[Any]]):
        """The lanes of kept indices, with the backgrounds of operands by `operands_of`."""
        self._kept, self._operands = kept, operands
        self._values: dict[Body, dict[core.Var, Value]] = {}
        self._makers: dict[Body, dict[core.Var, Node]] = {}
        self._callers: dict[Body, tuple[Body, Node]] = {}

    def enter(self, body: Body, values: dict[core.Var, Value]) -> None:
        """A function begins; ``values`` is filled while it runs."""
        if self._operands:
            self._values[body] = values
            self._makers[body] = {v: node for node in body.nodes for v in node.eqn.outvars}
            self._callers.update((b, (body, node)) for node in body.nodes for b in node.bodies)

    def summed(self, body: Body, node: Node, total: Value) -> Value:
        """The result of a sum, and the removed indices' share of it."""
        for k in node.params["axes"] if node in self._operands else ():
            axis = node.ins[0][k]
            if self._operands[node][0].axes[k] is LANE and self._kept.shrinks((axis,)):
                lane = self._operand(body, node, 0, k)
                (one,) = _compat.bind(node.eqn, [lane])
                count = len(axis) - self._kept.size(axis)
                total = total + jnp.asarray(count, one.dtype) * one
        return total

    def _operand(self, body: Body, node: Node, i: int, k: int) -> Value:
        """The lane of an operand along its axis ``k``."""
        known = self._operands[node][i].axes[k]
        v, axes = node.eqn.invars[i], node.ins[i]
        if known is LANE:
            return self._made(body, v, k)
        shape = [1 if j == k else self._kept.size(a) for j, a in enumerate(axes)]
        return jnp.full(shape, known, _compat.type_of(v).dtype)

    def _made(self, body: Body, v: Value, k: int) -> Value:
        """The lane of a value, by the equation that makes it."""
        node = self._makers[body].get(v)
        if node is None:
            outer, call = self._callers[body]
            return self._operand(outer, call, body.jaxpr.invars.index(v), k)
        if node.name == "transpose":
            order = node.params["permutation"]
            return lax.transpose(self._operand(body, node, 0, order[k]), order)
        if node.name == "squeeze":
            gone = node.params["dimensions"]
            stays = [i for i in range(len(node.ins[0])) if i not in gone]
            return lax.squeeze(self._operand(body, node, 0, stays[k]), gone)
        if node.name == "broadcast_in_dim":
            return self._broadcast(body, node, v, k)
        full = lambda axes: axes and len(axes[k]) == len(node.outs[0][k])
        operands = [
            self._operand(body, node, i, k) if full(axes) else self._value(body, operand)
            for i, (operand, axes) in enumerate(zip(node.eqn.invars, node.ins, strict=True))
        ]
        return _compat.bind(node.eqn, operands)[0]

    def _broadcast(self, body: Body, node: Node, v: core.Var, k: int) -> Value:
        dims, out = node.params["broadcast_dimensions"], node.outs[0]
        if k in dims and len(node.ins[0][dims.index(k)]) == len(out[k]):
            shape = [1 if j == k else self._kept.size(a) for j, a in enumerate(out)]
            own = self._operand(body, node, 0, dims.index(k))
            return lax.broadcast_in_dim(own, shape, dims)
        # It is the same at all indices, those that are left included.
        return lax.slice_in_dim(self._value(body, v), 0, 1, axis=k)

    def _value(self, body: Body, v: core.Var | core.Literal) -> Value:
        return v.val if isinstance(v, core.Literal) else self._values[body][v]
