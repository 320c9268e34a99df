"""Called functions, loops and branches, rebuilt around smaller bodies."""

from collections.abc import Sequence

import jax
from jax import lax
from jax.sharding import Sharding

from jaxopt_compress.lift import _compat
from jaxopt_compress.rewriting.coupling.equations import Node, build, couples, replays
from jaxopt_compress.rewriting.coupling.graph import Axes, Graph
from jaxopt_compress.rewriting.coupling.replay import Kept, run
from jaxopt_compress.typing import Value

INLINE = ("jit", "pjit", "closed_call", "core_call")
CALLS = (*INLINE, "remat2", "checkpoint")
DERIVATIVES = ("custom_jvp_call", "custom_vjp_call")


@couples(*CALLS, *DERIVATIVES)
def _call(graph: Graph, node: Node) -> list[Axes]:
    p = node.params
    body = build(
        graph, p["jaxpr"] if "jaxpr" in p else p["call_jaxpr"], node.ins, node.known, node.line
    )
    node.bodies, node.notes["inlined"] = [body], True
    return list(body.outs)


@replays(*INLINE)
def _call_again(kept: Kept, node: Node, values: list[Value]) -> list[Value]:
    """In place; the shardings that the call asked for become constraints."""
    whole = (None,) * max(len(values), len(node.outs))
    values = _constrained(values, node.params.get("in_shardings", whole))
    with jax.named_scope(node.params.get("name", "call")):
        results = run(node.bodies[0], kept, values)
    return _constrained(results, node.params.get("out_shardings", whole))


def _constrained(values: Sequence[Value], shardings: Sequence[Sharding | None]) -> list[Value]:
    named = lambda s: isinstance(s, jax.sharding.NamedSharding)
    pin = lambda x, s: lax.with_sharding_constraint(x, s) if named(s) else x
    return list(map(pin, values, shardings))


@replays("remat2", "checkpoint")
def _remat_again(kept: Kept, node: Node, values: list[Value]) -> list[Value]:
    body = lambda *operands: run(node.bodies[0], kept, operands)
    p = node.params
    return jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])(*values)


@couples("scan")
def _scan(graph: Graph, node: Node) -> list[Axes]:
    consts, carry, xs = _compat.scan_split(node.params, node.ins)
    known, _, _ = _compat.scan_split(node.params, node.known)
    node.notes["split"] = len(consts), len(carry)
    inner = [*consts, *carry, *(axes[1:] for axes in xs)]
    body = build(graph, node.params["jaxpr"], inner, known, node.line)
    node.bodies = [body]
    for after, before in zip(body.outs, carry, strict=False):
        graph.tie_all(after, before)
    lead = xs[0][0] if xs else graph.axis(node.params["length"])
    for axes in xs:
        graph.tie(lead, axes[0])
    node.notes["lead"] = lead
    if not xs:
        graph.protect((lead,), f"{node.where()} runs over it")
    return [*carry, *((lead, *axes) for axes in body.outs[len(carry) :])]


@replays("scan")
def _scan_again(kept: Kept, node: Node, values: list[Value]) -> list[Value]:
    p, (consts, carries) = node.params, node.notes["split"]
    fixed, carry, xs = (
        values[:consts],
        values[consts : consts + carries],
        values[consts + carries :],
    )

    def step(state: list[Value], x: list[Value]) -> tuple[list[Value], list[Value]]:
        results = run(node.bodies[0], kept, [*fixed, *state, *x])
        return results[:carries], results[carries:]

    state, ys = lax.scan(
        step,
        carry,
        xs,
        length=kept.size(node.notes["lead"]),
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*state, *ys]


@couples("while")
def _while(graph: Graph, node: Node) -> list[Axes]:
    first, second = node.params["cond_nconsts"], node.params["body_nconsts"]
    carry = node.ins[first + second :]
    inner = [*node.ins[:first], *carry], [*node.ins[first : first + second], *carry]
    jaxprs = node.params["cond_jaxpr"], node.params["body_jaxpr"]
    node.bodies = [
        build(graph, j, ins, None, node.line) for j, ins in zip(jaxprs, inner, strict=True)
    ]
    for after, before in zip(node.bodies[1].outs, carry, strict=True):
        graph.tie_all(after, before)
    return list(carry)


@replays("while")
def _while_again(kept: Kept, node: Node, values: list[Value]) -> list[Value]:
    first, second = node.params["cond_nconsts"], node.params["body_nconsts"]
    cond_consts, body_consts = values[:first], values[first : first + second]
    cond, body = node.bodies
    return lax.while_loop(
        lambda state: run(cond, kept, [*cond_consts, *state])[0],
        lambda state: run(body, kept, [*body_consts, *state]),
        values[first + second :],
    )


@couples("cond")
def _cond(graph: Graph, node: Node) -> list[Axes]:
    known = node.known[1:]
    node.bodies = [build(graph, j, node.ins[1:], known, node.line) for j in node.params["branches"]]
    first, *others = node.bodies
    for other in others:
        for a, b in zip(other.outs, first.outs, strict=True):
            graph.tie_all(a, b)
    return list(first.outs)


@replays("cond")
def _cond_again(kept: Kept, node: Node, values: list[Value]) -> list[Value]:
    branches = [lambda *operands, b=b: run(b, kept, operands) for b in node.bodies]
    return lax.switch(values[0], branches, *values[1:])
