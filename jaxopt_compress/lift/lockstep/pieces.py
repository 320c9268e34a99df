"""Compiled pieces of a staged function; equal pieces are compiled once."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from jaxopt_compress.lift import _compat
from jaxopt_compress.lift.segments import part
from jaxopt_compress.typing import PyTree, Value


class Pieces:
    """The compiled pieces, by their equations and by their text.

    Layers of an unrolled model are different equations that read alike: they share one program.
    """

    def __init__(self) -> None:
        self._by_equations: dict[tuple[int, ...], Any] = {}
        self._by_text: dict[Hashable, Callable[..., PyTree]] = {}

    def __len__(self) -> int:
        return len(self._by_text)

    def of(
        self, run: Sequence[JaxprEqn], outputs: Sequence[Var], debug_info: DebugInfo
    ) -> tuple[Callable[..., list[Value]], list[Var]]:
        """A compiled function for some equations, and the variables that it reads."""
        key = (*map(id, run), *map(id, outputs))
        if key not in self._by_equations:
            jaxpr, read = part(run, outputs, debug_info)
            text = signature(jaxpr)
            if text not in self._by_text:
                self._by_text[text] = jax.jit(jaxpr_as_fun(ClosedJaxpr(jaxpr, [])))
            # The equations are kept, so that no other gets their identity.
            self._by_equations[key] = (self._by_text[text], read, tuple(run))
        return self._by_equations[key][:2]

    def shared(
        self, key: Hashable, make: Callable[[], Callable[..., PyTree]]
    ) -> Callable[..., PyTree]:
        """A function compiled for ``key``; made on first use."""
        if key not in self._by_text:
            self._by_text[key] = jax.jit(make())
        return self._by_text[key]


def signature(jaxpr: Jaxpr) -> Value:
    """A key that is equal for pieces that compute the same, whatever their variables' names."""
    types = tuple(str(v.aval) for v in (*jaxpr.invars, *jaxpr.outvars))
    weak = tuple(bool(getattr(v.aval, "weak_type", False)) for v in jaxpr.invars)
    return str(jaxpr), types, weak, tuple(_constants(jaxpr))


def _constants(jaxpr: Jaxpr | ClosedJaxpr) -> list[Value]:
    """The identity of constants and large literals, which the text of a jaxpr does not show."""
    inner, consts = _compat.parts(jaxpr)
    found: list[Value] = [id(c) for c in consts]
    for eqn in inner.eqns:
        found += [
            id(v.val) for v in eqn.invars if isinstance(v, Literal) and _compat.type_of(v).shape
        ]
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            found += _constants(value) if _is_jaxpr(value) else []
    return found


def _is_jaxpr(x: Value) -> bool:
    return isinstance(x, Jaxpr | ClosedJaxpr)
