"""Functions that run on the shards of their operands, and what their devices tell each other.

An axis that is split over devices is a product: of the devices, which stay, and of the indices of a
shard. So a unit takes one index of each shard, and shards stay equally long.
"""

import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec

from jaxopt_compress.lift import _compat
from jaxopt_compress.rewriting.coupling.background import (
    Background,
    Walk,
    backgrounds,
    constant,
    rule,
    without_lanes,
)
from jaxopt_compress.rewriting.coupling.constants import is_zero
from jaxopt_compress.rewriting.coupling.equations import Node, build, couples, replays
from jaxopt_compress.rewriting.coupling.graph import Axes, Axis, Graph
from jaxopt_compress.rewriting.coupling.replay import Kept, run
from jaxopt_compress.typing import Value

_TOTALS = ("psum", "psum2", "psum_invariant")
_EXTREMES = ("pmax", "pmin")
_MOVES = ("ppermute", "pvary", "pcast", "all_gather", "all_gather_invariant", "reduce_scatter")


@couples("shard_map")
def _shard_map(graph: Graph, node: Node) -> list[Axes]:
    p = node.params
    sizes = dict(p["mesh"].shape)
    node.notes["devices"] = math.prod(sizes[name] for name in _compat.manual_axes(p))
    devices: dict[int, Axis] = {}

    def device_axis(entry: str | tuple[str, ...] | None) -> int:
        names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        n = math.prod(sizes[name] for name in names)
        if n > 1 and n not in devices:
            devices[n] = graph.axis(n)
            graph.protect((devices[n],), f"{node.where()} splits it over devices")
        return n

    def shard(axis: Axis, entry: str | tuple[str, ...] | None) -> Axis:
        n = device_axis(entry)
        if n == 1:
            return axis
        own, inner = graph.split(axis, (n, len(axis) // n))
        graph.protect((own,), f"{node.where()} splits it over devices")
        return inner

    def joined(axis: Axis, entry: str | tuple[str, ...] | None) -> Axis:
        n = device_axis(entry)
        return axis if n == 1 else graph.join((devices[n], axis))

    def each(
        fn: Callable[[Axis, str | tuple[str, ...] | None], Axis],
        values: Sequence[Axes],
        specs: Sequence[PartitionSpec],
    ) -> list[Axes]:
        entries = lambda spec, axes: (*spec, *(None,) * (len(axes) - len(spec)))
        return [
            tuple(map(fn, axes, entries(spec, axes)))
            for axes, spec in zip(values, specs, strict=True)
        ]

    body = build(graph, p["jaxpr"], each(shard, node.ins, p["in_specs"]), None, node.line)
    node.bodies = [body]
    return each(joined, body.outs, p["out_specs"])


@replays("shard_map")
def _shard_map_again(kept: Kept, node: Node, values: list[Value]) -> list[Value]:
    p = node.params
    return jax.shard_map(
        lambda *operands: run(node.bodies[0], kept, operands),
        mesh=p["mesh"],
        in_specs=tuple(p["in_specs"]),
        out_specs=list(p["out_specs"]),
        axis_names=_compat.manual_axes(p),
        check_vma=p["check_vma"],
    )(*values)


@rule("shard_map")
def _on_shards(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    return backgrounds(node.bodies[0], walk, list(map(without_lanes, ins)))


@couples(*_TOTALS, *_EXTREMES, "ppermute", "pvary", "pcast")
def _same_axes(graph: Graph, node: Node) -> list[Axes] | None:
    del graph
    # Numbers are axes of arrays, which were mapped.
    names = node.params.get("axes", ())
    return None if any(isinstance(n, int) for n in names) else list(node.ins)


@couples("all_gather", "all_gather_invariant")
def _all_gather(graph: Graph, node: Node) -> list[Axes] | None:
    p, axes = node.params, node.ins[0]
    if p.get("axis_index_groups") is not None or any(isinstance(n, int) for n in p["axis_name"]):
        return None
    k, devices = p["all_gather_dimension"], graph.axis(p["axis_size"])
    graph.protect((devices,), f"{node.where()} gathers it from devices")
    if not p["tiled"]:
        return [(*axes[:k], devices, *axes[k:])]
    return [(*axes[:k], graph.join((devices, axes[k])), *axes[k + 1 :])]


@couples("reduce_scatter")
def _reduce_scatter(graph: Graph, node: Node) -> list[Axes] | None:
    p, axes = node.params, node.ins[0]
    if p.get("axis_index_groups") is not None or not p["tiled"]:
        return None
    k = p["scatter_dimension"]
    devices, inner = graph.split(axes[k], (p["axis_size"], len(axes[k]) // p["axis_size"]))
    graph.protect((devices,), f"{node.where()} splits it over devices")
    return [(*axes[:k], inner, *axes[k + 1 :])]


@rule(*_TOTALS, *_EXTREMES, *_MOVES)
def _told(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    """Totals of zeros are zero; what is only moved stays as it is."""
    del walk
    total = node.name in (*_TOTALS, "reduce_scatter")
    only = lambda v: v if not total or is_zero(v) else None
    found = []
    for b, axes in zip(ins, node.outs, strict=True):
        own = tuple(map(only, b.axes))
        if len(own) < len(axes):
            k = node.params["all_gather_dimension"]
            own = (*own[:k], None, *own[k:])
        found.append(Background(own, only(constant(b))))
    return found
