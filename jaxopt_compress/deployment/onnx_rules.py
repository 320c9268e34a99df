"""Primitives of JAX as nodes of ONNX: one small function each."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from jaxopt_compress.deployment.onnx_graph import Graph
from jaxopt_compress.lift._compat import type_of

Rule = Callable[[Graph, Any, list[str]], str | list[str]]

# Calls whose inside is walked, and the parameter that holds it.
INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers how primitives are written."""

    def add(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return add


ELEMENTWISE = {
    **{"add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow"},
    **{"neg": "Neg", "exp": "Exp", "log": "Log", "tanh": "Tanh", "logistic": "Sigmoid"},
    **{"sqrt": "Sqrt", "erf": "Erf", "abs": "Abs", "sign": "Sign", "floor": "Floor"},
    **{"ceil": "Ceil", "gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less"},
    **{"le": "LessOrEqual", "eq": "Equal", "and": "And", "or": "Or", "not": "Not"},
    **{"max": "Max", "min": "Min", "stop_gradient": "Identity", "copy": "Identity"},
    **{"copy_p": "Identity", "optimization_barrier": "Identity"},
}


def _elementwise(graph: Graph, op: str, eqn: JaxprEqn, given: list[str], **params: Any) -> str:
    """A node that broadcasts: narrow if all that it takes along the symbolic dimension is."""
    made = graph.node(op, given, **params)
    long = [
        name for name, x in zip(given, eqn.invars, strict=False) if _has_symbol(type_of(x).shape)
    ]
    if long and graph.narrow.issuperset(long):
        graph.narrow.add(made)
    return made


def _has_symbol(shape: Any) -> bool:
    return not all(map(_is_number, shape))


def _is_number(d: Any) -> bool:
    return isinstance(d, (int, np.integer))


@rule(*ELEMENTWISE)
def _(graph: Graph, eqn: JaxprEqn, given: list[str]) -> str:
    return _elementwise(graph, ELEMENTWISE[eqn.primitive.name], eqn, given)


@rule("square")
def _(graph: Graph, eqn: JaxprEqn, given: list[str]) -> str:
    return _elementwise(graph, "Mul", eqn, given * 2)


@rule("rsqrt")
def _(graph: Graph, eqn: JaxprEqn, given: list[str]) -> str:
    return _elementwise(graph, "Reciprocal", eqn, [_elementwise(graph, "Sqrt", eqn, given)])


@rule("erfc")
def _(graph: Graph, eqn: JaxprEqn, given: list[str]) -> str:
    one = graph.constant(np.ones((), type_of(eqn.invars[0]).dtype))
    negative = _elementwise(graph, "Neg", eqn, [_elementwise(graph, "Erf", eqn, given)])
    return _elementwise(graph, "Add", eqn, [negative, one])


@rule("integer_pow")
def _(graph: Graph, eqn: JaxprEqn, given: list[str]) -> str:
    exponent = graph.constant(np.asarray(eqn.params["y"], type_of(eqn.invars[0]).dtype))
    return _elementwise(graph, "Pow", eqn, [*given, exponent])


@rule("select_n")
def _(graph: Graph, eqn: JaxprEqn, given: list[str]) -> str:
    if len(given) != 3 or type_of(eqn.invars[0]).dtype != bool:
        raise NotImplementedError("export_onnx cannot write a select_n of more than two cases")
    return _elementwise(graph, "Where", eqn, [given[0], given[2], given[1]])


@rule("convert_element_type")
def _(graph: Graph, eqn: JaxprEqn, given: list[str]) -> str:
    kind = graph.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(eqn.params["new_dtype"]))
    return _elementwise(graph, "Cast", eqn, given, to=kind)


def reshaped(graph: Graph, x: str, shape: Any) -> str:
    """A reshape, in which one dimension may be a symbol."""
    if sum(not _is_number(d) for d in shape) > 1:
        raise NotImplementedError(
            f"export_onnx cannot write a reshape to {shape} with several symbols"
        )
    sizes = np.asarray([int(d) if _is_number(d) else -1 for d in shape], np.int64)
    return graph.node("Reshape", [graph.materialized(x), graph.constant(sizes)])


def transposed(graph: Graph, x: str, order: Any) -> str:
    """A transpose, left out if nothing moves."""
    if list(order) == sorted(order):
        return x
    return graph.node("Transpose", [graph.materialized(x)], perm=[int(d) for d in order])


@rule("reshape", "squeeze", "expand_dims")
def _(graph: Graph, eqn: JaxprEqn, given: list[str]) -> str:
    return reshaped(graph, given[0], type_of(eqn.outvars[0]).shape)


@rule("transpose")
def _(graph: Graph, eqn: JaxprEqn, given: list[str]) -> str:
    return transposed(graph, given[0], eqn.params["permutation"])


@rule("broadcast_in_dim")
def _(graph: Graph, eqn: JaxprEqn, given: list[str]) -> str:
    """Along a symbol nothing is repeated, which what broadcasts makes up for."""
    source, target = type_of(eqn.invars[0]).shape, type_of(eqn.outvars[0]).shape
    placed = dict(zip(eqn.params["broadcast_dimensions"], source, strict=True))
    x = given[0]
    aligned = tuple(placed.get(d, 1) for d in range(len(target)))
    if aligned != tuple(source):
        x = reshaped(graph, x, aligned)
    if aligned == tuple(target):
        return x
    sizes = np.asarray([int(d) if _is_number(d) else 1 for d in target], np.int64)
    made = graph.node("Expand", [x, graph.constant(sizes)])
    if _has_symbol(target) and not _has_symbol(aligned):
        graph.narrow.add(made)
    return made


@rule("concatenate")
def _(graph: Graph, eqn: JaxprEqn, given: list[str]) -> str:
    each = [graph.materialized(x) for x in given]
    return graph.node("Concat", each, axis=eqn.params["dimension"])


@rule("slice")
def _(graph: Graph, eqn: JaxprEqn, given: list[str]) -> str:
    rank = len(eqn.params["start_indices"])
    strides = eqn.params["strides"] or (1,) * rank
    whole = np.iinfo(np.int64).max
    for size, limit in zip(type_of(eqn.invars[0]).shape, eqn.params["limit_indices"], strict=True):
        if not _is_number(limit) and limit != size:
            raise NotImplementedError(
                f"export_onnx cannot write a slice to {limit} of a symbolic dimension of {size}"
            )
    limits = [d if _is_number(d) else whole for d in eqn.params["limit_indices"]]
    parts = (eqn.params["start_indices"], limits, range(rank), strides)
    constants = [graph.constant(np.asarray(list(p), np.int64)) for p in parts]
    return graph.node("Slice", [graph.materialized(given[0]), *constants])


REDUCED = {
    **{"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"},
    "reduce_prod": "ReduceProd",
}


@rule(*REDUCED)
def _(graph: Graph, eqn: JaxprEqn, given: list[str]) -> str:
    axes = graph.constant(np.asarray(eqn.params["axes"], np.int64))
    op = REDUCED[eqn.primitive.name]
    return graph.node(op, [graph.materialized(given[0]), axes], keepdims=0)


@rule("argmax")
def _(graph: Graph, eqn: JaxprEqn, given: list[str]) -> str:
    (axis,) = eqn.params["axes"]
    made = graph.node("ArgMax", [graph.materialized(given[0])], axis=axis, keepdims=0)
    kind = graph.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(eqn.params["index_dtype"]))
    return graph.node("Cast", [made], to=kind)


@rule("dot_general")
def _(graph: Graph, eqn: JaxprEqn, given: list[str]) -> str:
    """One product of matrices, or of stacks of them."""
    given = [graph.materialized(x) for x in given]
    (ours, theirs), (batch, batch_of_right) = eqn.params["dimension_numbers"]
    left, right = (type_of(x).shape for x in eqn.invars)
    free = [d for d in range(len(left)) if d not in (*ours, *batch)]
    columns = [d for d in range(len(right)) if d not in (*theirs, *batch_of_right)]
    a = transposed(graph, given[0], (*batch, *free, *ours))
    b = transposed(graph, given[1], (*batch_of_right, *theirs, *columns))
    k = math.prod(left[d] for d in ours)
    lead = [left[d] for d in batch]
    rows = [left[d] for d in free]
    if len(ours) != 1 or (batch and len(free) != 1):
        a = reshaped(graph, a, (*lead, *([math.prod(rows)] if batch else rows), k))
    if len(ours) != 1 or len(columns) != 1:
        b = reshaped(graph, b, (*lead, k, math.prod(right[d] for d in columns)))
    made = graph.node("MatMul", [a, b])
    shape = type_of(eqn.outvars[0]).shape
    plain = len(columns) == 1 and len(free) > 0 and not (batch and len(free) != 1)
    return made if plain else reshaped(graph, made, shape)


@rule("conv_general_dilated")
def _(graph: Graph, eqn: JaxprEqn, given: list[str]) -> str:
    """A convolution, channels before space as ONNX has them."""
    p = eqn.params
    if p["batch_group_count"] != 1 or any(d != 1 for d in p["lhs_dilation"]):
        raise NotImplementedError(
            "export_onnx cannot write conv_general_dilated with batch groups, or transposed "
            "(lhs_dilation)"
        )
    dims = p["dimension_numbers"]
    x = transposed(graph, given[0], dims.lhs_spec)
    w = transposed(graph, given[1], dims.rhs_spec)
    pads = [low for low, _ in p["padding"]] + [high for _, high in p["padding"]]
    steps = {"strides": list(p["window_strides"]), "dilations": list(p["rhs_dilation"])}
    both = [graph.materialized(x), graph.materialized(w)]
    made = graph.node("Conv", both, pads=pads, group=p["feature_group_count"], **steps)
    return transposed(graph, made, np.argsort(dims.out_spec))


@rule("reduce_window_max", "reduce_window_sum")
def _(graph: Graph, eqn: JaxprEqn, given: list[str]) -> str:
    """Pooling over the last two or the middle axes of an image."""
    p, name = eqn.params, eqn.primitive.name
    window, strides = p["window_dimensions"], p["window_strides"]
    rank = len(window)
    space = [d for d in range(rank) if window[d] > 1 or strides[d] > 1]
    dilated = any(d != 1 for d in (*p["base_dilation"], *p["window_dilation"]))
    if rank != 4 or dilated or len(space) != 2:
        raise NotImplementedError(f"export_onnx: {name} over windows {window} of {rank} axes")
    order = [*(d for d in range(rank) if d not in space), *space]
    pads = [p["padding"][d][0] for d in space] + [p["padding"][d][1] for d in space]
    kernel = {"kernel_shape": [window[d] for d in space], "strides": [strides[d] for d in space]}
    x = transposed(graph, graph.materialized(given[0]), order)
    if name == "reduce_window_max":
        made = graph.node("MaxPool", [x], pads=pads, **kernel)
    else:
        mean = graph.node("AveragePool", [x], pads=pads, count_include_pad=1, **kernel)
        count = graph.constant(np.asarray(math.prod(window), np.float32))
        made = graph.node("Mul", [mean, count])
    return transposed(graph, made, np.argsort(order))
