"""Operations on entries of equal index, and reductions."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_compress.lift import _compat
from jaxopt_compress.rewriting.coupling.equations import Node, couples, opaque, replays
from jaxopt_compress.rewriting.coupling.graph import Axes, Graph
from jaxopt_compress.typing import Value

# Grouped by what is known of 0, which `background` builds on.
ZERO_TO_ZERO = frozenset(
    "neg abs sign sin tan tanh asin atan sinh asinh atanh sqrt cbrt erf erf_inv expm1 log1p round "
    "floor ceil square real imag conj convert_element_type copy stop_gradient reduce_precision "
    "sharding_constraint name".split()
)
ELEMENTWISE = ZERO_TO_ZERO | frozenset(
    "exp exp2 log cos cosh acos acosh logistic rsqrt not is_finite lgamma digamma erfc "
    "bitcast_convert_type population_count clz integer_pow "
    "add sub mul div rem pow max min nextafter atan2 add_any and or xor complex "
    "eq ne lt le gt ge eq_to lt_to le_to select_n clamp "
    "shift_left shift_right_logical shift_right_arithmetic".split()
)
REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor".split()
)
CUMULATIVE = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())


@couples(*ELEMENTWISE)
def _elementwise(graph: Graph, node: Node) -> list[Axes] | None:
    if node.name == "eq":
        graph.compare(*node.ins)
    shape = node.out_shape()
    full = [axes for axes in node.ins if axes]
    if any(len(axes) != len(shape) for axes in full):
        return None  # a bitcast to another width
    out = []
    for k, n in enumerate(shape):
        # An axis of length 1 is stretched, and has no index in common with the others.
        same = [axes[k] for axes in full if len(axes[k]) == n]
        if not same:
            return None
        for other in same[1:]:
            graph.tie(same[0], other)
        out.append(same[0])
    return [tuple(out)]


@couples("optimization_barrier")
def _barrier(graph: Graph, node: Node) -> list[Axes]:
    del graph
    return list(node.ins)


@couples("iota")
def _iota(graph: Graph, node: Node) -> list[Axes]:
    axes = graph.axes(node.out_shape())
    graph.counts(axes[node.params["dimension"]])
    return [axes]


@replays("iota")
def _iota_again(kept: Any, node: Node, values: list[Value]) -> list[Value]:
    """Indices keep their numbers."""
    del values
    p, axes = node.params, node.outs[0]
    numbers = np.flatnonzero(kept.alive(axes[p["dimension"]])).astype(p["dtype"])
    named = {"out_sharding": p.get("sharding")}
    return [lax.broadcast_in_dim(numbers, kept.shape(axes), (p["dimension"],), **named)]


@couples(*REDUCTIONS)
def _reduce(graph: Graph, node: Node) -> list[Axes]:
    del graph
    gone = node.params["axes"]
    return [tuple(a for i, a in enumerate(node.ins[0]) if i not in gone)] * len(node.eqn.outvars)


@couples("argmax", "argmin")
def _arg(graph: Graph, node: Node) -> list[Axes]:
    axes = node.ins[0]
    graph.protect(
        tuple(axes[i] for i in node.params["axes"]), f"{node.where()} numbers its indices"
    )
    return [tuple(a for i, a in enumerate(axes) if i not in node.params["axes"])]


@couples(*CUMULATIVE)
def _cumulative(graph: Graph, node: Node) -> list[Axes]:
    graph.protect((node.ins[0][node.params["axis"]],), f"{node.where()} runs along it")
    return [node.ins[0]]


@couples("sort")
def _sort(graph: Graph, node: Node) -> list[Axes]:
    for axes in node.ins[1:]:
        graph.tie_all(node.ins[0], axes)
    graph.protect((node.ins[0][node.params["dimension"]],), f"{node.where()} orders it")
    return list(node.ins)


@couples("top_k")
def _top_k(graph: Graph, node: Node) -> list[Axes] | None:
    axes = node.ins[0]
    at = node.params.get("axis", len(axes) - 1) % len(axes)
    best, numbers = (graph.axis(node.out_shape()[at]) for _ in range(2))
    graph.protect((best, numbers), f"{node.where()} orders it")
    graph.chooses(numbers, axes[at])
    node.notes["axis"] = at
    return [(*axes[:at], last, *axes[at + 1 :]) for last in (best, numbers)]


@replays("top_k")
def _top_k_again(kept: Any, node: Node, values: list[Value]) -> list[Value]:
    """Indices keep their numbers."""
    found, at = _compat.bind(node.eqn, values)
    numbers = np.flatnonzero(kept.alive(node.ins[0][node.notes["axis"]]))
    return [found, jnp.asarray(numbers, at.dtype)[at]]


# Random numbers are drawn for all indices, so that those that are left get the same ones.
couples(
    "random_bits", "random_seed", "random_wrap", "random_unwrap", "random_split", "random_fold_in",
    "threefry2x32", "rng_bit_generator",
)(opaque)  # fmt: skip
