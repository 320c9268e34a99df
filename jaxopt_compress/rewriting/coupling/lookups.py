"""Operations that read or write entries at positions."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxopt_compress.rewriting.coupling.equations import Constant, Node, couples, replays
from jaxopt_compress.rewriting.coupling.graph import Axes, Axis, Graph
from jaxopt_compress.rewriting.coupling.products import bind_with
from jaxopt_compress.rewriting.coupling.shapes import take, taken
from jaxopt_compress.typing import Value


@couples("gather")
def _gather(graph: Graph, node: Node) -> list[Axes]:
    numbers, (operand, indices) = node.params["dimension_numbers"], node.ins
    sizes, shape = node.params["slice_sizes"], node.out_shape()
    batched = numbers.operand_batching_dims
    collapsed = {*numbers.collapsed_slice_dims, *batched}
    free = [i for i in range(len(operand)) if i not in collapsed]
    rest = [o for o in range(len(shape)) if o not in numbers.offset_dims]
    graph.protect(indices[-1:], f"{node.where()} reads it as an index")
    for i, j in zip(batched, numbers.start_indices_batching_dims, strict=True):
        graph.tie(operand[i], indices[j])
    out: list[Axis] = [graph.axis(n) for n in shape]
    for o, axis in zip(rest, indices[:-1], strict=True):
        out[o] = axis
    passing = [i for i in free if sizes[i] == len(operand[i]) and i not in numbers.start_index_map]
    for o, i in zip(numbers.offset_dims, free, strict=True):
        if i in passing:
            out[o] = operand[i]
        else:
            graph.protect((out[o], operand[i]), f"{node.where()} looks it up by index")
    node.notes["passing"] = passing
    if (at := _constant_positions(node)) is not None:
        i, positions = numbers.start_index_map[0], at
        out[rest[0]] = operand[i][positions]
        node.notes["positions"] = positions
        return [tuple(out)]
    looked_up = {*numbers.start_index_map, *numbers.collapsed_slice_dims} - set(batched)
    by_index = tuple(operand[i] for i in sorted(looked_up))
    graph.protect(by_index, f"{node.where()} looks it up by index")
    return [tuple(out)]


def _constant_positions(node: Node) -> np.ndarray | None:
    """The positions along one axis that a lookup by constants reads; None if it is another."""
    numbers, (operand, indices) = node.params["dimension_numbers"], node.ins
    dims, known = numbers.start_index_map, node.known[1]
    one = len(dims) == 1 and dims == numbers.collapsed_slice_dims and len(indices) == 2
    if not one or numbers.operand_batching_dims or known is None:
        return None
    positions = known.value.reshape(-1)
    inside = (positions >= 0) & (positions < len(operand[dims[0]]))
    return positions if inside.all() else None


@replays("gather")
def _gather_again(kept: Any, node: Node, values: list[Value]) -> list[Value]:
    numbers = node.params["dimension_numbers"]
    if "positions" in node.notes:
        i = numbers.start_index_map[0]
        x = take(values[0], taken(kept, node.ins[0][i], node.notes["positions"]), i)
        (to,) = [o for o in range(x.ndim) if o not in numbers.offset_dims]
        return [jnp.moveaxis(x, i, to)]
    sizes = list(node.params["slice_sizes"])
    for i in node.notes["passing"]:
        sizes[i] = kept.size(node.ins[0][i])
    return bind_with(node, values, slice_sizes=tuple(sizes))


@couples("dynamic_slice")
def _dynamic_slice(graph: Graph, node: Node) -> list[Axes]:
    out = []
    starts = _starts(node.known[1:], node.ins[0], node.params["slice_sizes"])
    for axis, n, start in zip(node.ins[0], node.params["slice_sizes"], starts, strict=True):
        if len(axis) == n:
            out.append(axis)
        elif start is not None:
            out.append(axis[start : start + n])
        else:
            fresh = graph.axis(n)
            graph.protect((axis, fresh), f"{node.where()} looks it up by index")
            out.append(fresh)
    node.notes["starts"] = starts
    return [tuple(out)]


def _starts(known: list[Constant | None], axes: Axes, sizes: tuple[int, ...]) -> list[int | None]:
    """The positions at which a slice starts along each axis, as far as they are constants."""
    fixed = len(known) == len(axes)
    found: list[int | None] = []
    for axis, n, start in zip(axes, sizes, known if fixed else [None] * len(axes), strict=True):
        whole = None if start is None or len(axis) == n else int(start.value)
        found.append(None if whole is None else min(max(whole, 0), len(axis) - n))
    return found


@replays("dynamic_slice")
def _dynamic_slice_again(kept: Any, node: Node, values: list[Value]) -> list[Value]:
    x, *starts = values
    sizes = list(kept.shape(node.outs[0]))
    for k, (axis, start) in enumerate(zip(node.ins[0], node.notes["starts"], strict=True)):
        if start is not None:
            n = node.params["slice_sizes"][k]
            x = take(x, taken(kept, axis, np.arange(start, start + n)), k)
    return bind_with(node, [x, *starts], slice_sizes=tuple(sizes))


@couples("dynamic_update_slice")
def _dynamic_update_slice(graph: Graph, node: Node) -> list[Axes]:
    for axis, new in zip(node.ins[0], node.ins[1], strict=True):
        if len(axis) == len(new):
            graph.tie(axis, new)
        else:
            graph.protect((axis, new), f"{node.where()} writes to it by index")
    return [node.ins[0]]


@couples("scatter", "scatter-add", "scatter_add", "scatter_mul", "scatter_min", "scatter_max")
def _scatter(graph: Graph, node: Node) -> list[Axes]:
    """Axes that updates cover as a whole are theirs too; others are written to by index."""
    numbers, (operand, indices, updates) = node.params["dimension_numbers"], node.ins
    batched = numbers.operand_batching_dims
    inserted = {*numbers.inserted_window_dims, *batched}
    window = [i for i in range(len(operand)) if i not in inserted]
    rest = [o for o in range(len(updates)) if o not in numbers.update_window_dims]
    graph.protect(indices[-1:], f"{node.where()} reads it as an index")
    for o, axis in zip(rest, indices[:-1], strict=True):
        graph.tie(updates[o], axis)
    for i, j in zip(batched, numbers.scatter_indices_batching_dims, strict=True):
        graph.tie(operand[i], indices[j])
    by_index = {*numbers.scatter_dims_to_operand_dims, *numbers.inserted_window_dims}
    for o, i in zip(numbers.update_window_dims, window, strict=True):
        if len(updates[o]) == len(operand[i]) and i not in by_index:
            graph.tie(updates[o], operand[i])
        else:
            by_index.add(i)
            graph.protect((updates[o],), f"{node.where()} writes it by index")
    written = tuple(operand[i] for i in sorted(by_index))
    graph.protect(written, f"{node.where()} writes to it by index")
    return [operand]
