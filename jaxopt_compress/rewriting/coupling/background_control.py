"""Backgrounds of the results of called functions, loops and branches."""

from jaxopt_compress.rewriting.coupling.background import (
    Background,
    Walk,
    backgrounds,
    rule,
    same,
    uniform,
    without_lanes,
)
from jaxopt_compress.rewriting.coupling.constants import Carried
from jaxopt_compress.rewriting.coupling.control import CALLS, DERIVATIVES, INLINE
from jaxopt_compress.rewriting.coupling.equations import Node


@rule(*CALLS, *DERIVATIVES)
def _call(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    if node.name not in INLINE:
        ins = list(map(without_lanes, ins))
    if node.name in DERIVATIVES:
        # Their rules for derivatives do not know of lanes, so none is made either.
        walk = walk._replace(seen=None)
    return backgrounds(node.bodies[0], walk, ins)


@rule("scan")
def _scan(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    ins = list(map(without_lanes, ins))
    first, count = node.notes["split"]
    inside = lambda b: Background(b.axes[1:], b.everywhere)
    xs = list(map(inside, ins[first + count :]))
    if walk.shrinks(node.notes["lead"]):
        _check_identity(walk, node, ins, first, count)
    carry, outs = _settled(walk, node, ins[:first], ins[first : first + count], xs)
    return [*carry, *(Background((None, *b.axes), b.everywhere) for b in outs[count:])]


def _check_identity(walk: Walk, node: Node, ins: list[Background], first: int, count: int) -> None:
    """Whether a removed step, whose slices are constants, hands on what it gets."""
    body = node.bodies[0]
    number = range(first, first + count)
    given = [b.everywhere for b in ins[:first]]
    given += [Carried(i) for i in number]
    given += [b.axes[0] for b in ins[first + count :]]
    start = [uniform(axes, value) for axes, value in zip(body.ins, given, strict=True)]
    outs = backgrounds(body, Walk(walk.kept, [], every=True), start)
    changed = [i for i, b in zip(number, outs, strict=False) if b.everywhere != Carried(i)]
    what = "runs over steps that, masked, change what they carry"
    walk.reduced(node, not changed, what)


@rule("while")
def _while(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    ins = list(map(without_lanes, ins))
    first, second = node.params["cond_nconsts"], node.params["body_nconsts"]
    carry, _ = _settled(walk, node, ins[first : first + second], ins[first + second :], [])
    backgrounds(node.bodies[0], walk, [*ins[:first], *carry])
    return carry


def _settled(
    walk: Walk, node: Node, fixed: list[Background], carry: list[Background], xs: list[Background]
) -> tuple[list[Background], list[Background]]:
    """The backgrounds of a carry that hold before and after the body, and of its results."""
    while True:
        inner = walk._replace(inexact=[])
        outs = backgrounds(node.bodies[-1], inner, [*fixed, *carry, *xs])
        outs = list(map(without_lanes, outs))
        after = [_both(a, b) for a, b in zip(carry, outs, strict=False)]
        if after == carry:
            walk.inexact.extend(inner.inexact)
            return carry, outs
        carry = after


def _both(a: Background, b: Background) -> Background:
    axes = tuple(same(pair) for pair in zip(a.axes, b.axes, strict=True))
    return Background(axes, same([a.everywhere, b.everywhere]))


@rule("cond")
def _cond(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    given = list(map(without_lanes, ins[1:]))
    first, *others = (backgrounds(body, walk, given) for body in node.bodies)
    for other in others:
        first = list(map(_both, first, other))
    return first
