"""How much memory a traced function needs, if nothing is fused."""

from collections.abc import Callable, Iterator

import jax
from jax.extend.core import Jaxpr, Literal, Var

from jaxopt_compress.arrays.base import stored_bytes
from jaxopt_compress.typing import PyTree


def peak_bytes(fn: Callable[..., PyTree], *args: PyTree) -> int:
    """The most bytes that are live at once in ``fn(*args)``, arguments and results included.

    Each operation writes its result, and values that are not arguments are freed after their last
    use. Compilers fuse, so that they need less; decompositions use work space, which is not seen.

    Example:
        >>> import jax.numpy as jnp
        >>> peak_bytes(lambda x: jnp.sum(jnp.exp(jnp.sin(x))), jnp.ones(250))
        3000
    """
    return _peak(jax.make_jaxpr(fn)(*args).jaxpr)


def _peak(jaxpr: Jaxpr) -> int:
    is_variable = lambda v: not hasattr(v, "val")
    last = {v: i for i, e in enumerate(jaxpr.eqns) for v in e.invars if is_variable(v)}
    # Whoever calls holds the arguments, and gets the results.
    kept = {v for v in (*jaxpr.invars, *jaxpr.constvars, *jaxpr.outvars) if is_variable(v)}
    live = sum(_bytes(v) for v in (*jaxpr.invars, *jaxpr.constvars))
    peak = live
    for i, equation in enumerate(jaxpr.eqns):
        live += sum(map(_bytes, equation.outvars))
        own = sum(_bytes(v) for v in (*equation.invars, *equation.outvars))
        inside = max((_peak(inner) - own for inner in _inner(equation.params)), default=0)
        peak = max(peak, live + max(inside, 0))
        used = {v for v in (*equation.invars, *equation.outvars) if is_variable(v)}
        live -= sum(_bytes(v) for v in used if last.get(v, i) == i and v not in kept)
    return peak


def _bytes(variable: Var | Literal) -> int:
    shape, dtype = getattr(variable.aval, "shape", None), getattr(variable.aval, "dtype", None)
    if shape is None or dtype is None:
        return 0
    return stored_bytes(jax.ShapeDtypeStruct(shape, dtype))


def _inner(params: PyTree) -> Iterator[Jaxpr]:
    """The functions that an operation calls."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            found = getattr(each, "jaxpr", each)
            if hasattr(found, "eqns"):
                yield found
