"""Functions of a documented set of operations as ONNX files, with weights as integers."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import QuantizedArray, is_compressed
from jaxopt_compress.deployment.onnx_graph import Graph, dims_of
from jaxopt_compress.deployment.onnx_rules import INLINED, RULES
from jaxopt_compress.extras import require
from jaxopt_compress.tree import named_leaves
from jaxopt_compress.typing import Leaf, PyTree

# The first one with 4-bit weights and scales of blocks; its IR is what runtimes of that age read.
OPSET, IR = 21, 10
FORMATS = ("int8", "int4")


def export_onnx(
    path: str | os.PathLike[str], fn: Callable[..., PyTree], params: PyTree, *args: PyTree
) -> None:
    """Writes a function and its compressed weights as a file of ONNX.

    Weights stay what they are in the file: int8 or int4 codes, one scale per tensor, channel or
    group, behind a ``DequantizeLinear``. Runtimes choose how to multiply by them; activations are
    float32. Operations have to be among these, which MLPs and CNNs are made of: products and
    convolutions, sums, differences, products, quotients, powers, exp, log, tanh, erf, sqrt, the
    logistic function, comparisons and choices, max, min, relu and what is made of these (gelu,
    silu, softmax), reductions, max and average pooling, reshapes, transposes, broadcasts, slices,
    concatenations and casts.

    Args:
        path: The file, ``model.onnx``. Replaced if it is there.
        fn: ``fn(params, *args)``; not lifted. Its results are arrays in any tree.
        params: A tree with `QuantizedArray` leaves of int8 or int4 and dense ones.
        *args: Arrays or their types. One dimension may be a symbol: ``"batch, 28, 28"`` of
            ``jax.export.symbolic_shape``. In the file they are ``input_0``, ``input_1``, ..., and
            results ``output_0``, ... in the order of `jax.tree.leaves`.

    Raises:
        NotImplementedError: An operation outside of the set; names the primitive and what it does.
        TypeError: A compressed leaf in another form; names its path.
        ModuleNotFoundError: onnx is not installed; it comes with ``jaxopt-compress[deploy]``.

    Example:
        >>> import onnxruntime, tempfile, jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> fn = lambda params, x: jax.nn.relu(x @ params["w"])
        >>> small = jc.compress({"w": jnp.ones((64, 32))}, jc.quantize("int8"), layout="in,out")
        >>> x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 64"), "float32")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     jc.export_onnx(f"{folder}/model.onnx", fn, small, x)
        ...     session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
        >>> session.run(None, {"input_0": np.ones((3, 64), np.float32)})[0].shape
        (3, 32)
    """
    onnx = require("onnx", extra="deploy")
    graph = Graph(onnx)
    dense = jax.eval_shape(lambda p: _dense(p), params)
    traced = jax.make_jaxpr(fn)(dense, *args)
    inputs = [_weight(graph, name, leaf) for name, leaf in named_leaves(params)]
    types = jax.tree.leaves(jax.eval_shape(lambda *args: args, *args))
    for i, x in enumerate(types):
        graph.inputs.append(graph.value(f"input_{i}", x))
        inputs.append(f"input_{i}")
    outputs = _walk(graph, traced.jaxpr, traced.consts, inputs)
    for i, (name, x) in enumerate(zip(outputs, traced.out_avals, strict=True)):
        graph.node("Identity", [graph.materialized(name)], [f"output_{i}"])
        graph.outputs.append(graph.value(f"output_{i}", x))
    helper = onnx.helper
    made = helper.make_graph(graph.nodes, "main", graph.inputs, graph.outputs, graph.constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    onnx.checker.check_model(model)
    onnx.save(model, os.fspath(path))


def _dense(params: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x: x.materialize() if is_compressed(x) else jnp.asarray(x),
        params,
        is_leaf=is_compressed,
    )


def _weight(graph: Graph, path: str, leaf: Leaf) -> str:
    """A parameter in its stored form, and what makes floats of it."""
    if not is_compressed(leaf):
        return graph.constant(np.asarray(leaf), path)
    known = isinstance(leaf, QuantizedArray) and leaf.format in FORMATS
    if not known or leaf.zero is not None or leaf.tile or is_compressed(leaf.scale):
        form = getattr(leaf, "format", "")
        raise TypeError(
            f"{path!r} of shape {tuple(leaf.shape)} is a {type(leaf).__name__} {form}: ONNX takes "
            f"symmetric {' and '.join(FORMATS)} without tiles; materialize it, or compress it so"
        )
    # The codes of pruned entries are written too.
    codes = leaf.codes.materialize() if is_compressed(leaf.codes) else leaf.codes
    codes, scale = np.asarray(codes), np.asarray(leaf.scale, np.float32)
    axes = [d for d in range(scale.ndim) if scale.shape[d] > 1]
    axis, block = None, None
    grouped = [d for d in axes if scale.shape[d] < codes.shape[d]]
    if grouped:
        # Scales of blocks are as many along the other axes as there are entries.
        axis, block = grouped[0], leaf.group_size
        whole = [scale.shape[d] if d in grouped else n for d, n in enumerate(codes.shape)]
        scale = np.broadcast_to(scale, whole)
    elif len(axes) == 1:
        axis, scale = axes[0], scale.reshape(-1)
    elif axes:
        # Scales along several axes are factors of their own.
        one = graph.constant(np.ones((), np.float32), f"{path}/one")
        raw = graph.node("DequantizeLinear", [graph.constant(codes, f"{path}/codes"), one])
        return graph.node("Mul", [raw, graph.constant(scale, f"{path}/scale")])
    else:
        scale = scale.reshape(())
    named = [graph.constant(codes, f"{path}/codes"), graph.constant(scale, f"{path}/scale")]
    return graph.node("DequantizeLinear", named, axis=axis, block_size=block)


def _walk(graph: Graph, jaxpr: Any, consts: list[Any], inputs: list[str]) -> list[str]:
    """Adds the nodes of equations; returns the names of the results."""
    names: dict[Any, str] = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, value in zip(jaxpr.constvars, consts, strict=True):
        names[var] = graph.constant(np.asarray(value))

    def read(x: Leaf) -> str:
        return graph.constant(np.asarray(x.val, x.aval.dtype)) if hasattr(x, "val") else names[x]

    for eqn in jaxpr.eqns:
        name, given = eqn.primitive.name, [read(x) for x in eqn.invars]
        if name in INLINED:
            inner = eqn.params[INLINED[name]]
            closed = hasattr(inner, "consts")
            made = _walk(
                graph, inner.jaxpr if closed else inner, inner.consts if closed else [], given
            )
        elif name in RULES:
            made = RULES[name](graph, eqn, given)
            made = [made] if isinstance(made, str) else made
        else:
            types = ", ".join(f"{x.aval.dtype}{dims_of(x.aval)}" for x in eqn.invars)
            raise NotImplementedError(
                f"export_onnx has no form for the primitive {name!r} of {types}; there are "
                f"{', '.join(sorted(RULES))}. jaxopt_compress.export takes any function"
            )
        names.update(zip(eqn.outvars, made, strict=True))
    return [read(x) for x in jaxpr.outvars]
