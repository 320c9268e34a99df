"""Operations that move entries, and leave them as they are."""

import itertools
import math
from typing import Any

import numpy as np
from jax import lax

from jaxopt_compress.lift import _compat
from jaxopt_compress.rewriting.coupling.equations import Node, couples, replays
from jaxopt_compress.rewriting.coupling.graph import Axes, Axis, Graph
from jaxopt_compress.rewriting.coupling.products import bind_with
from jaxopt_compress.typing import Value


@couples("broadcast_in_dim")
def _broadcast(graph: Graph, node: Node) -> list[Axes]:
    source = dict(zip(node.params["broadcast_dimensions"], node.ins[0], strict=True))
    same = lambda i, n: i in source and len(source[i]) == n
    return [
        tuple(source[i] if same(i, n) else graph.axis(n) for i, n in enumerate(node.out_shape()))
    ]


@replays("broadcast_in_dim")
def _broadcast_again(kept: Any, node: Node, values: list[Value]) -> list[Value]:
    dims = node.params["broadcast_dimensions"]
    named = {"out_sharding": node.params.get("sharding")}
    return [lax.broadcast_in_dim(values[0], kept.shape(node.outs[0]), dims, **named)]


@couples("transpose")
def _transpose(graph: Graph, node: Node) -> list[Axes]:
    del graph
    return [tuple(node.ins[0][i] for i in node.params["permutation"])]


@couples("squeeze")
def _squeeze(graph: Graph, node: Node) -> list[Axes]:
    del graph
    gone = node.params["dimensions"]
    return [tuple(a for i, a in enumerate(node.ins[0]) if i not in gone)]


@couples("rev")
def _rev(graph: Graph, node: Node) -> list[Axes]:
    del graph
    turned = node.params["dimensions"]
    return [tuple(a[::-1] if i in turned else a for i, a in enumerate(node.ins[0]))]


@couples("concatenate")
def _concatenate(graph: Graph, node: Node) -> list[Axes]:
    k, first = node.params["dimension"], node.ins[0]
    for axes in node.ins[1:]:
        graph.tie_all(first[:k] + first[k + 1 :], axes[:k] + axes[k + 1 :])
    joined = np.concatenate([axes[k] for axes in node.ins])
    return [(*first[:k], joined, *first[k + 1 :])]


@couples("stack")
def _stack(graph: Graph, node: Node) -> list[Axes]:
    k, first = node.params["axis"], node.ins[0]
    for axes in node.ins[1:]:
        graph.tie_all(first, axes)
    new = graph.axis(len(node.ins))
    graph.protect((new,), f"{node.where()} makes it of whole values")
    return [(*first[:k], new, *first[k:])]


@couples("unstack")
def _unstack(graph: Graph, node: Node) -> list[Axes]:
    k, axes = node.params["axis"], node.ins[0]
    graph.protect(axes[k : k + 1], f"{node.where()} takes it apart")
    return [(*axes[:k], *axes[k + 1 :])] * len(node.eqn.outvars)


@couples("tile")
def _tile(graph: Graph, node: Node) -> list[Axes]:
    """Indices become pairs: of a copy, and of an index of it."""
    pairs = zip(node.ins[0], node.params["reps"], strict=True)
    return [tuple(a if n == 1 else graph.join((graph.axis(n), a)) for a, n in pairs)]


@replays("tile")
def _tile_again(kept: Any, node: Node, values: list[Value]) -> list[Value]:
    pairs = zip(node.ins[0], node.outs[0], strict=True)
    return bind_with(node, values, reps=tuple(kept.size(b) // kept.size(a) for a, b in pairs))


def taken(kept: Any, before: Axis, positions: np.ndarray) -> np.ndarray:
    """Where entries at some positions are, after others along the axis were removed."""
    alive = kept.alive(before)
    return (np.cumsum(alive) - 1)[positions[alive[positions]]]


@couples("slice")
def _slice(graph: Graph, node: Node) -> list[Axes]:
    del graph
    cuts = zip(node.ins[0], *_bounds(node), strict=True)
    return [tuple(a if t == 1 and len(a) == e - s else a[s:e:t] for a, s, e, t in cuts)]


@replays("slice")
def _slice_again(kept: Any, node: Node, values: list[Value]) -> list[Value]:
    x = values[0]
    for k, (axis, s, e, t) in enumerate(zip(node.ins[0], *_bounds(node), strict=True)):
        x = take(x, taken(kept, axis, np.arange(s, e, t)), k)
    return [x]


def take(x: Value, positions: np.ndarray, axis: int) -> Value:
    """Entries along an axis; a slice where positions are evenly spaced."""
    n = len(positions)
    if n == x.shape[axis] and np.array_equal(positions, np.arange(n)):
        return x
    sharding = _compat.explicit_sharding(x)
    if sharding is not None:
        at = (slice(None),) * axis + (positions,)
        return x.at[at].get(mode="clip", out_sharding=sharding)
    steps = np.unique(np.diff(positions))
    if n and len(steps) <= 1 and (steps > 0).all():
        step = int(steps[0]) if len(steps) else 1
        start, stop = int(positions[0]), int(positions[-1]) + 1
        return lax.slice_in_dim(x, start, stop, step, axis)
    return x.take(positions, axis=axis, mode="clip")


def _bounds(node: Node) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    p = node.params
    return p["start_indices"], p["limit_indices"], p["strides"] or (1,) * len(node.ins[0])


@couples("split")
def _split(graph: Graph, node: Node) -> list[Axes]:
    del graph
    k, axes = node.params["axis"], node.ins[0]
    pieces = np.split(axes[k], np.cumsum(node.params["sizes"])[:-1])
    return [(*axes[:k], piece, *axes[k + 1 :]) for piece in pieces]


@replays("split")
def _split_again(kept: Any, node: Node, values: list[Value]) -> list[Value]:
    k = node.params["axis"]
    return list(lax.split(values[0], [kept.size(axes[k]) for axes in node.outs], k))


@couples("pad")
def _pad(graph: Graph, node: Node) -> list[Axes]:
    out = []
    for axis, n, (low, high, inner) in zip(
        node.ins[0], node.out_shape(), node.params["padding_config"], strict=True
    ):
        if low == high == inner == 0:
            out.append(axis)
        elif min(low, high) < 0 or inner:
            fresh = graph.axis(n)
            graph.protect((axis, fresh), f"{node.where()} pads between its entries, or cuts it")
            out.append(fresh)
        else:
            out.append(np.concatenate([graph.axis(low), axis, graph.axis(high)]))
    return [tuple(out)]


@replays("pad")
def _pad_again(kept: Any, node: Node, values: list[Value]) -> list[Value]:
    config = []
    for axis, (low, high, inner) in zip(node.outs[0], node.params["padding_config"], strict=True):
        if min(low, high) >= 0 and not inner:
            low, high = kept.size(axis[:low]), kept.size(axis[len(axis) - high :])
        config.append((low, high, inner))
    return [lax.pad(values[0], values[1], config)]


@couples("reshape")
def _reshape(graph: Graph, node: Node) -> list[Axes] | None:
    axes, shape = node.ins[0], node.out_shape()
    if node.params.get("dimensions") is not None or 0 in shape:
        return None
    out: list[Axis | None] = [None] * len(shape)
    for before, after in _segments(tuple(map(len, axes)), shape):
        sizes = _refinement([len(axes[k]) for k in before], [shape[k] for k in after])
        if sizes is None:
            fresh = [graph.axis(shape[k]) for k in after]
            why = f"{node.where()} has no factors in common: {tuple(map(len, axes))} to {shape}"
            graph.protect((*(axes[k] for k in before), *fresh), why)
            for k, axis in zip(after, fresh, strict=True):
                out[k] = axis
            continue
        factors: list[Axis] = []
        for k, own in zip(before, _runs(sizes, [len(axes[k]) for k in before]), strict=True):
            factors += [axes[k]] if len(own) == 1 else graph.split(axes[k], own)
        start = 0
        for k, own in zip(after, _runs(sizes, [shape[k] for k in after]), strict=True):
            part = tuple(factors[start : start + len(own)])
            out[k] = part[0] if len(part) == 1 else graph.join(part)
            start += len(own)
    return [tuple(graph.axis(1) if axis is None else axis for axis in out)]


@replays("reshape")
def _reshape_again(kept: Any, node: Node, values: list[Value]) -> list[Value]:
    named = {"out_sharding": node.params.get("sharding")}
    return [lax.reshape(values[0], kept.shape(node.outs[0]), **named)]


def _segments(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list, list]]:
    """The shortest runs of axes, longer than 1, that a reshape maps onto each other."""
    left = [k for k, n in enumerate(before) if n != 1]
    right = [k for k, n in enumerate(after) if n != 1]
    found = []
    while left or right:
        a, b = [left.pop(0)], [right.pop(0)]
        x, y = before[a[0]], after[b[0]]
        while x != y:
            if x < y:
                a.append(left.pop(0))
                x *= before[a[-1]]
            else:
                b.append(right.pop(0))
                y *= after[b[-1]]
        found.append((a, b))
    return found


def _refinement(before: list[int], after: list[int]) -> list[int] | None:
    """The coarsest sizes of which runs make up both sides; None if there are none."""
    strides = {1}
    for sizes in (before, after):
        strides |= {math.prod(sizes[i:]) for i in range(len(sizes))}
    order = sorted(strides, reverse=True)
    pairs = list(itertools.pairwise(order))
    return None if any(a % b for a, b in pairs) else [a // b for a, b in pairs]


def _runs(sizes: list[int], lengths: list[int]) -> list[tuple[int, ...]]:
    """The runs of ``sizes`` whose products are ``lengths``."""
    rest, found = list(sizes), []
    for n in lengths:
        own = [rest.pop(0)]
        while math.prod(own) < n:
            own.append(rest.pop(0))
        found.append(tuple(own))
    return found
