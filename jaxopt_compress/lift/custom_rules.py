"""Functions with derivatives or solutions of their own around compressed values."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr

from jaxopt_compress.lift import _compat
from jaxopt_compress.lift.control_flow import dense_values
from jaxopt_compress.lift.interpreter import Call, Ref, control_rule, replay_jaxpr
from jaxopt_compress.lift.observe import tape as tapes
from jaxopt_compress.typing import Value


@control_rule("custom_jvp_call")
def _custom_jvp(call: Call) -> list[Value]:
    """Runs the function on compressed values; differentiates its own rule on dense ones."""
    run, by_own_rule = _with_own_rule(call, call.params["call_jaxpr"])
    fn = jax.custom_jvp(run)
    fn.defjvp(lambda primals, tangents: jax.jvp(by_own_rule, primals, tangents))
    return _observed(call, fn)


@control_rule("custom_vjp_call")
def _custom_vjp(call: Call) -> list[Value]:
    """Runs the function on compressed values; differentiates its own rule on dense ones."""
    run, by_own_rule = _with_own_rule(call, call.params["call_jaxpr"])
    # Arrays that the function closes over come first, and have no derivatives.
    fixed = call.params["num_consts"]
    fn = jax.custom_vjp(run)

    def forward(*values):
        return jax.vjp(lambda *rest: by_own_rule(*values[:fixed], *rest), *values[fixed:])

    fn.defvjp(forward, lambda pull, cotangents: ((None,) * fixed) + pull(cotangents))
    return _observed(call, fn)


def _with_own_rule(call: Call, jaxpr: ClosedJaxpr) -> tuple[Value, Value]:
    """A body that returns ``(results, frame)``, and the same to be differentiated.

    The derivatives of the results are by the function's own rule. The observed values inside
    are not part of it: their derivatives are those of the operations before them.
    """
    replay, enclosing = call.replay, call.replay.enclosing

    def run(*values):
        # JAX may trace it for derivatives when the replay has gone on.
        outer, replay.enclosing = replay.enclosing, enclosing
        try:
            with tapes.collect(replay.tape) as seen:
                results = replay_jaxpr(replay, jaxpr, values)
            return dense_values(call, results), seen.values
        finally:
            replay.enclosing = outer

    def by_own_rule(*values):
        seen = {} if replay.tape is None else run(*values)[1]
        return _bind_dense(call, values), seen

    return run, by_own_rule


def _observed(
    call: Call, fn: Callable[..., tuple[list[Value], dict[tapes.Key, Value]]]
) -> list[Value]:
    results, seen = fn(*call.operands)
    tapes.absorb(call.replay.tape, seen)
    return results


def _bind_dense(call: Call, values: Sequence[Value]) -> list[Value]:
    dense = [x.array.materialize() if isinstance(x, Ref) else x for x in values]
    return _compat.bind(call.eqn, dense)


@control_rule("custom_linear_solve")
def _custom_linear_solve(call: Call) -> list[Value]:
    """Solves with compressed values among what the linear map and its solvers close over."""
    jaxprs, lengths = call.params["jaxprs"], call.params["const_lengths"]
    rest, consts = list(call.operands), {}
    for name in ("matvec", "vecmat", "solve", "transpose_solve"):
        count = getattr(lengths, name)
        consts[name], rest = rest[:count], rest[count:]
    b = dense_values(call, rest)
    unknowns, replay, enclosing = len(b), call.replay, call.replay.enclosing
    others: Any = None

    def run(name: str, values: Sequence[Value]) -> tuple[list[Value], Value]:
        # JAX may trace them for derivatives when the replay has gone on. Only the solver is a part
        # of the function itself.
        outer, replay.enclosing = replay.enclosing, enclosing
        tape, replay.tape = replay.tape, replay.tape if name == "solve" else None
        try:
            with tapes.collect(replay.tape) as seen:
                results = replay_jaxpr(replay, getattr(jaxprs, name), [*consts[name], *values])
            return dense_values(call, results), seen.values
        finally:
            replay.enclosing, replay.tape = outer, tape

    def solve(_: Value, values: Sequence[Value]) -> tuple[list[Value], Value]:
        nonlocal others
        results, seen = run("solve", values)
        aux = (results[unknowns:], seen)
        others = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), aux)
        return results[:unknowns], aux

    def transpose_solve(_: Value, values: Sequence[Value]) -> tuple[list[Value], Value]:
        # JAX wants what `solve` returns beside its solution here too.
        results, _ = run("transpose_solve", values)
        return results[:unknowns], jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), others)

    x, (aux, seen) = lax.custom_linear_solve(
        lambda values: run("matvec", values)[0],
        b,
        solve,
        None if jaxprs.transpose_solve is None else transpose_solve,
        symmetric=jaxprs.transpose_solve is not None and jaxprs.vecmat is jaxprs.matvec,
        has_aux=True,
    )
    tapes.absorb(replay.tape, seen)
    return [*x, *aux]
