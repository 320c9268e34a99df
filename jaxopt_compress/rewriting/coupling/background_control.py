"""Backgrounds of what called functions, loops and branches return."""

from jaxopt_compress.rewriting.coupling.background import (
    Background,
    Walk,
    backgrounds,
    rule,
    same,
)
from jaxopt_compress.rewriting.coupling.control import CALLS, DERIVATIVES
from jaxopt_compress.rewriting.coupling.equations import Node


@rule(*CALLS, *DERIVATIVES)
def _call(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    return backgrounds(node.bodies[0], walk, ins)


@rule("scan", "while")
def _loop(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    """Runs the body until what is known of the carry holds after it, too."""
    if node.name == "scan":
        first, count = node.notes["split"]
    else:
        first = node.params["cond_nconsts"] + node.params["body_nconsts"]
        count = len(ins) - first
    before = node.params["cond_nconsts"] if node.name == "while" else 0
    found = list(ins)
    while True:
        inner = Walk(walk.kept, [])
        outs = backgrounds(node.bodies[-1], inner, found[before:])
        carry = [_both(a, b) for a, b in zip(found[first : first + count], outs, strict=False)]
        if carry == found[first : first + count]:
            break
        found[first : first + count] = carry
    walk.inexact.extend(inner.inexact)
    if node.name == "while":
        backgrounds(node.bodies[0], walk, [*found[:before], *carry])
    return [*carry, *(Background(b.removed) for b in outs[count:])]


def _both(a: Background, b: Background) -> Background:
    return Background(same([a.removed, b.removed]), same([a.everywhere, b.everywhere]))


@rule("cond")
def _cond(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    every = [backgrounds(body, walk, ins[1:]) for body in node.bodies]
    return [Background(same([b.removed for b in results])) for results in zip(*every, strict=True)]
