"""Products, convolutions and windows."""

from typing import Any

from jaxopt_compress.lift import _compat
from jaxopt_compress.rewriting.coupling.equations import Node, couples, replays
from jaxopt_compress.rewriting.coupling.graph import Axes, Axis, Graph
from jaxopt_compress.typing import PyTree, Value


@couples("dot_general")
def _dot(graph: Graph, node: Node) -> list[Axes]:
    (lc, rc), (lb, rb) = node.params["dimension_numbers"]
    left, right = node.ins
    for i, j in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        graph.tie(left[i], right[j])
    batch = [left[i] for i in lb]
    free = [a for i, a in enumerate(left) if i not in (*lc, *lb)]
    return [(*batch, *free, *(a for i, a in enumerate(right) if i not in (*rc, *rb)))]


@couples("ragged_dot_general")
def _ragged_dot(graph: Graph, node: Node) -> list[Axes] | None:
    """Rows in groups, each group by a matrix of its own: rows and groups stay."""
    numbers, (left, right) = node.params["ragged_dot_dimension_numbers"], node.ins[:2]
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    (rows,), groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    if rows in (*lc, *lb):
        return None
    why = f"{node.where()} takes rows by their group"
    graph.protect((left[rows], *(right[i] for i in groups), *node.ins[2]), why)
    for i, j in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        graph.tie(left[i], right[j])
    batch = [left[i] for i in lb]
    free = [a for i, a in enumerate(left) if i not in (*lc, *lb)]
    own = [a for i, a in enumerate(right) if i not in (*rc, *rb, *groups)]
    return [(*batch, *free, *own)]


@couples("conv_general_dilated")
def _conv(graph: Graph, node: Node) -> list[Axes] | None:
    if node.params["batch_group_count"] != 1:
        return None
    numbers, (x, w) = node.params["dimension_numbers"], node.ins
    lhs, rhs, to = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    shape = node.out_shape()
    out: list[Axis] = [graph.axis(n) for n in shape]
    windows = (*(x[k] for k in lhs[2:]), *(w[k] for k in rhs[2:]), *(out[k] for k in to[2:]))
    graph.protect(windows, f"{node.where()} slides a window over it")
    out[to[0]], out[to[1]] = x[lhs[0]], w[rhs[0]]
    groups = node.params["feature_group_count"]
    if groups == 1:
        graph.tie(x[lhs[1]], w[rhs[1]])
        return [tuple(out)]
    # Channels are pairs: of a group, and of a channel inside of it.
    node.notes["groups"] = group = graph.axis(groups)
    for whole, inner in ((x[lhs[1]], w[rhs[1]]), (w[rhs[0]], None)):
        own = len(whole) // groups
        graph.product(whole, (group, graph.axis(own) if inner is None else inner))
    return [tuple(out)]


@replays("conv_general_dilated")
def _conv_again(kept: Any, node: Node, values: list[Value]) -> list[Value]:
    if "groups" not in node.notes:
        return _compat.bind(node.eqn, values)
    groups = kept.size(node.notes["groups"])
    return bind_with(node, values, feature_group_count=groups)


def bind_with(node: Node, values: list[Value], **changed: PyTree) -> list[Value]:
    """Binds the primitive of an equation with some parameters changed."""
    out = node.eqn.primitive.bind(*values, **{**node.params, **changed})
    return list(out) if node.eqn.primitive.multiple_results else [out]


@couples("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _window(graph: Graph, node: Node) -> list[Axes]:
    p, out = node.params, []
    dilations = [
        p.get(name) or (1,) * len(node.ins[0]) for name in ("base_dilation", "window_dilation")
    ]
    for k, (axis, n) in enumerate(zip(node.ins[0], node.out_shape(), strict=True)):
        whole = p["window_dimensions"][k] == p["window_strides"][k] == 1
        if whole and tuple(p["padding"][k]) == (0, 0) and all(d[k] == 1 for d in dilations):
            out.append(axis)
            continue
        fresh = graph.axis(n)
        graph.protect((axis, fresh), f"{node.where()} slides a window over it")
        out.append(fresh)
    return [tuple(out)]


PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")


def dot_numbers(node: Node) -> Any:
    """The dimension numbers of a product, without those of its groups."""
    if node.name == "ragged_dot_general":
        return node.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    return node.params["dimension_numbers"]


def multiplications(kept: Any, node: Node) -> int:
    """How many numbers a product or convolution multiplies, with the indices that are left."""
    if node.name != "conv_general_dilated":
        (lc, _), _ = dot_numbers(node)
        axes = (*node.outs[0], *(node.ins[0][i] for i in lc))
    else:
        rhs = node.params["dimension_numbers"].rhs_spec
        axes = (*node.outs[0], *(node.ins[1][k] for k in rhs[1:]))
    total = 1
    for axis in axes:
        total *= kept.size(axis)
    return total
