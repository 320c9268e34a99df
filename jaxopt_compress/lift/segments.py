"""Binding a run of equations at once.

Binding an equation again costs about as much as tracing it did. Under a trace, a long run of
equations that no compressed value reaches is therefore bound as one call of a jaxpr made of just
those equations, as they stand; compilers inline it.
"""

from collections.abc import Sequence

from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, JaxprEqn, Literal, Var

from jaxopt_compress.lift import _compat
from jaxopt_compress.typing import Value

# Shorter runs cost less bound one by one than called.
MIN_LENGTH = 8


def last_uses(jaxpr: Jaxpr) -> dict[Var, int]:
    """The index of the last equation that reads each variable; results are read at the end."""
    last: dict[Var, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        last.update((v, i) for v in eqn.invars if isinstance(v, Var))
    last.update((v, len(jaxpr.eqns)) for v in jaxpr.outvars if isinstance(v, Var))
    return last


def bind_run(
    run: Sequence[JaxprEqn],
    env: dict[Var, Value],
    last: dict[Var, int],
    now: int,
    debug_info: DebugInfo | None,
) -> None:
    """Binds the equations of ``run`` and writes to ``env`` what is read at ``now`` or later.

    Args:
        run: Equations in order, none of which reads a compressed value.
        env: The values of variables.
        last: From `last_uses`.
        now: The index of the first equation that has not run.
        debug_info: Where the function came from, if a call of a jaxpr is staged here; None if it
            would be compiled and run.
    """
    if debug_info is not None and len(run) >= MIN_LENGTH:
        _call(run, env, last, now, debug_info)
        return
    for eqn in run:
        values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        with _compat.equation_scope(eqn):
            results = _compat.bind(eqn, values)
        env.update(zip(eqn.outvars, results, strict=True))


def _call(
    run: Sequence[JaxprEqn],
    env: dict[Var, Value],
    last: dict[Var, int],
    now: int,
    debug_info: DebugInfo,
) -> None:
    outputs = read_later(run, last, now)
    jaxpr, read = part(run, outputs, debug_info)
    results = _compat.bind_call(ClosedJaxpr(jaxpr, []), [env[v] for v in read])
    env.update(zip(outputs, results, strict=True))


def read_later(run: Sequence[JaxprEqn], last: dict[Var, int], now: int) -> list[Var]:
    """The results of equations that are read by the equation ``now`` or a later one."""
    made = dict.fromkeys(v for eqn in run for v in eqn.outvars)
    return [v for v in made if last.get(v, -1) >= now]


def part(
    run: Sequence[JaxprEqn], outputs: Sequence[Var], debug_info: DebugInfo
) -> tuple[Jaxpr, list[Var]]:
    """Some equations as a jaxpr of their own, and the variables that it reads."""
    made: dict[Var, None] = {}
    read: dict[Var, None] = {}
    for eqn in run:
        read.update((v, None) for v in eqn.invars if isinstance(v, Var) and v not in made)
        made.update((v, None) for v in eqn.outvars)
    effects = frozenset().union(*(eqn.effects for eqn in run))
    return Jaxpr([], list(read), list(outputs), list(run), effects, debug_info), list(read)
