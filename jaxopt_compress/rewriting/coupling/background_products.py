"""Backgrounds of reductions, products and convolutions, which may meet removed entries."""

from typing import Any

import numpy as np

from jaxopt_compress.rewriting.coupling.background import (
    NAN,
    ZERO,
    Background,
    Walk,
    constant,
    rule,
)
from jaxopt_compress.rewriting.coupling.constants import LANE, Known, is_infinite, is_zero
from jaxopt_compress.rewriting.coupling.elementwise import CUMULATIVE, REDUCTIONS
from jaxopt_compress.rewriting.coupling.equations import Node
from jaxopt_compress.rewriting.coupling.products import dot_numbers

_NEUTRAL = {
    "reduce_sum": 0, "reduce_prod": 1, "reduce_and": 1, "reduce_or": 0, "reduce_xor": 0,
    "reduce_max": -np.inf, "reduce_min": np.inf,
}  # fmt: skip


@rule(*REDUCTIONS)
def _reduce(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    reduced, neutral = node.params["axes"], _NEUTRAL[node.name]
    for i in reduced:
        value = ins[0].axes[i]
        if node.name == "reduce_max" and walk.shrinks(node.ins[0][i]):
            value = walk.chosen(node, ins[0], i)
        if node.name == "reduce_sum" and value is LANE and _alone(walk, node, i):
            continue
        if walk.shrinks(node.ins[0][i]) and (value is None or value != neutral):
            known = "" if value is None or value is LANE else f": they are {value}"
            what = "reduces over entries that are not neutral where indices go"
            walk.reduced(node, False, f"{what}{known}")
    count = np.prod([len(node.ins[0][i]) for i in reduced], dtype=int)

    def of(value: Any) -> Known:
        if value is None or value is LANE:
            return None
        if node.name in ("reduce_max", "reduce_min") or value == neutral:
            return value
        return value * np.asarray(count, value.dtype) if node.name == "reduce_sum" else None

    axes = tuple(of(v) for i, v in enumerate(ins[0].axes) if i not in reduced)
    return [Background(axes, of(constant(ins[0])))]


def _alone(walk: Walk, node: Node, i: int) -> bool:
    """Whether no other axis that is reduced shrinks, so that the replay can add a lane."""
    return not any(walk.shrinks(node.ins[0][j]) for j in node.params["axes"] if j != i)


@rule(*CUMULATIVE, "reduce_window_sum")
def _running(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    del walk
    zero = node.name not in ("cumprod", "cumlogsumexp")
    return [Background(tuple(v if zero and is_zero(v) else None for v in ins[0].axes))]


_NO_ZEROS = "sums products that are not 0 where indices go"


def product(*factors: Known) -> Any:
    """The constant that products with some constants have; None for those not known."""
    if any(map(is_infinite, factors)):
        return NAN
    return ZERO if any(map(is_zero, factors)) else None


@rule("dot_general", "ragged_dot_general")
def _dot(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    (lc, rc), (lb, rb) = dot_numbers(node)
    ragged = node.params.get("ragged_dot_dimension_numbers")
    groups = ragged.rhs_group_dimensions if ragged else ()
    left, right = ins[0].axes, ins[1].axes
    for i, j in zip(lc, rc, strict=True):
        if walk.shrinks(node.ins[0][i]):
            walk.reduced(node, is_zero(product(left[i], right[j])), _NO_ZEROS)
    batch = [product(left[i], right[j]) for i, j in zip(lb, rb, strict=True)]
    free = [product(v) for i, v in enumerate(left) if i not in (*lc, *lb)]
    free += [product(v) for j, v in enumerate(right) if j not in (*rc, *rb, *groups)]
    zero = is_zero(product(*map(constant, ins[:2])))
    return [Background((*batch, *free), ZERO if zero else None)]


@rule("conv_general_dilated")
def _conv(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    numbers, (x, w) = node.params["dimension_numbers"], node.ins
    (lhs, rhs, to), out = numbers, [None] * len(node.outs[0])
    grouped = "groups" in node.notes
    features, inner = ins[0].axes[lhs[1]], ins[1].axes[rhs[1]]
    if walk.shrinks(w[rhs[1]] if grouped else x[lhs[1]]):
        walk.reduced(node, is_zero(product(features, inner)), _NO_ZEROS)
    # The outputs of a removed group meet nothing but its inputs and its weights.
    alone = grouped and walk.shrinks(x[lhs[1]]) and not walk.shrinks(w[rhs[1]])
    out[to[0]] = product(ins[0].axes[lhs[0]])
    out[to[1]] = product(ins[1].axes[rhs[0]], *([features] if alone else []))
    zero = is_zero(product(*map(constant, ins)))
    return [Background(tuple(out), ZERO if zero else None)]
