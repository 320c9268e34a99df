"""Backgrounds of operations that read or write entries at positions, or sort them."""

import numpy as np

from jaxopt_compress.rewriting.coupling.background import (
    Background,
    Walk,
    constant,
    rule,
    same,
)
from jaxopt_compress.rewriting.coupling.constants import Known, is_zero
from jaxopt_compress.rewriting.coupling.equations import Node


@rule("gather")
def _gather(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    del walk
    own = {id(a): v for a, v in zip(node.ins[0], ins[0].axes, strict=True)}
    out = [own.get(id(a)) for a in node.outs[0]]
    if "positions" in node.notes:
        numbers = node.params["dimension_numbers"]
        (to,) = [o for o in range(len(out)) if o not in numbers.offset_dims]
        out[to] = ins[0].axes[numbers.start_index_map[0]]
    return [Background(tuple(out))]


@rule("scatter", "scatter-add", "scatter_add", "scatter_mul", "scatter_min", "scatter_max")
def _scatter(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    (operand, indices, updates), numbers = node.ins, node.params["dimension_numbers"]
    if walk.shrinks(*indices):
        walk.reduced(node, False, "writes entries whose indices go")
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window = [i for i in range(len(operand)) if i not in gone]
    out: list[Known] = [None] * len(operand)
    for o, i in zip(numbers.update_window_dims, window, strict=True):
        if len(updates[o]) == len(operand[i]):
            value = same([ins[0].axes[i], ins[2].axes[o]])
            out[i] = value if node.name == "scatter" or is_zero(value) else None
    return [Background(tuple(out))]


@rule("stack", "unstack", "tile")
def _copies(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    """Copies beside each other, or taken apart again."""
    own = [b.axes for b in ins]
    if node.name == "tile":
        # The entries of removed copies are not masked.
        all_stay = lambda k, n: (
            walk.kept.size(node.outs[0][k]) == n * walk.kept.size(node.ins[0][k])
        )
        reps, whole = enumerate(node.params["reps"]), constant(ins[0])
        axes = tuple(own[0][k] if all_stay(k, n) else whole for k, n in reps)
        return [Background(axes, whole)]
    k = node.params["axis"]
    if node.name == "unstack":
        return [Background((*own[0][:k], *own[0][k + 1 :]), constant(ins[0]))] * len(node.outs)
    at = [
        same(vs) if walk.shrinks(a) else None
        for vs, a in zip(zip(*own, strict=True), node.ins[0], strict=True)
    ]
    return [Background((*at[:k], None, *at[k:]), same(list(map(constant, ins))))]


@rule("top_k")
def _top_k(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    """No removed entry is among the largest, if removed ones are smaller than all others."""
    (axes, _), k = node.outs, node.notes["axis"]
    if walk.shrinks(node.ins[0][k]):
        value = walk.chosen(node, ins[0], k)
        what = "orders entries that are not the least where indices go"
        walk.reduced(node, value is not None and bool(value == -np.inf), what)
        if walk.kept.size(node.ins[0][k]) < len(axes[k]):
            walk.reduced(node, False, f"takes {len(axes[k])} entries, and fewer are left")
    at = lambda i: None if i == k else ins[0].axes[i]
    return [Background(tuple(map(at, range(len(axes))))), Background((None,) * len(axes))]
