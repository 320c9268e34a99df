"""A function of parameters, with the coupling of all of its values."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxopt_compress.lift import _compat
from jaxopt_compress.rewriting.coupling.coupling import Coupling
from jaxopt_compress.rewriting.coupling.equations import Body, build
from jaxopt_compress.rewriting.coupling.graph import Axes, Graph
from jaxopt_compress.tree.globs import glob_matches
from jaxopt_compress.tree.paths import named_leaves
from jaxopt_compress.typing import Leaf, PyTree, Value

Names = str | Callable[[str], bool] | Sequence[str] | None


class Frame(NamedTuple):
    """What has to stay whole.

    Attributes:
        protect: The paths of parameters that stay.
        follow: The names of inputs (``in/0/...``) and outputs (``out/...``) that need not.
    """

    protect: Names = None
    follow: Names = None


class Analysis(NamedTuple):
    """One staged call of a function.

    Attributes:
        body: Its equations.
        coupling: What goes together.
        params: Path -> the axes of a parameter, in the order of the tree.
        inputs: Name -> the axes of an input, in the order of the tree.
        outputs: Name -> the axes of an output.
        values: The inputs.
        out_tree: The structure of the outputs.
    """

    body: Body
    coupling: Coupling
    params: dict[str, Axes]
    inputs: dict[str, Axes]
    outputs: dict[str, Axes]
    values: list[Leaf]
    out_tree: PyTree


def chosen(names: Names, name: str) -> bool:
    """Whether globs, or a predicate, choose a name."""
    if names is None:
        return False
    if callable(names):
        return bool(names(name))
    return any(glob_matches(p, name) for p in ([names] if isinstance(names, str) else names))


def named_inputs(args: tuple, kwargs: dict[str, PyTree]) -> dict[str, Leaf]:
    """Name -> array, of arguments: ``in/0/cache/k`` is in the first one after the parameters."""
    leaves = named_leaves({**{str(i): x for i, x in enumerate(args)}, **kwargs})
    return {f"in/{path}": x for path, x in leaves if hasattr(x, "shape")}


def type_of(x: Value, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    """The type of an array or tracer, of its own or of another shape."""
    own = jnp.shape(x) if shape is None else shape
    weak = bool(getattr(x, "weak_type", False))
    return jax.ShapeDtypeStruct(own, x.dtype, weak_type=weak, sharding=_compat.explicit_sharding(x))


def analyze(
    fn: Callable[..., PyTree],
    params: PyTree,
    args: tuple,
    kwargs: dict[str, PyTree],
    frame: Frame,
    whole: dict[str, tuple[int, ...]] | None = None,
) -> Analysis:
    """Stages ``fn(params, *args, **kwargs)`` and solves its coupling.

    Args:
        fn: Any JAX function.
        params: Whole parameters, or their types.
        args: Further arguments; what has no shape is static.
        kwargs: Likewise.
        frame: What stays whole.
        whole: Name -> the whole shape of an input that is passed without some indices.
    """
    values = named_inputs(args, kwargs)
    types = {name: type_of(x, (whole or {}).get(name)) for name, x in values.items()}
    tree: dict[str, PyTree] = {**{str(i): x for i, x in enumerate(args)}, **kwargs}
    flat, in_tree = jax.tree.flatten(tree)
    arrays = [i for i, x in enumerate(flat) if hasattr(x, "shape")]

    def call(params: PyTree, inputs: list[Value]) -> PyTree:
        full = list(flat)
        for i, x in zip(arrays, inputs, strict=True):
            full[i] = x
        given = in_tree.unflatten(full)
        return fn(
            params, *(given[str(i)] for i in range(len(args))), **{k: given[k] for k in kwargs}
        )

    shapes = jax.tree.map(type_of, params)
    jaxpr, out = jax.make_jaxpr(call, return_shape=True)(shapes, list(types.values()))
    graph = Graph()
    own = {path: graph.axes(x.shape) for path, x in named_leaves(shapes)}
    inputs = {name: graph.axes(x.shape) for name, x in types.items()}
    for path, axes in own.items():
        if chosen(frame.protect, path):
            graph.protect(axes, f"{path!r} is protected")
    for name, axes in inputs.items():
        if not chosen(frame.follow, name):
            graph.protect(axes, f"it is an axis of the input {name!r}")
    body = build(graph, jaxpr, [*own.values(), *inputs.values()])
    names = [f"out/{path}".rstrip("/") for path, _ in named_leaves(out)]
    outputs = dict(zip(names, body.outs, strict=True))
    for name, axes in outputs.items():
        if not chosen(frame.follow, name):
            graph.protect(axes, f"it is an axis of the output {name!r}")
    coupling = Coupling(graph, body.every_axis())
    out_tree = jax.tree.structure(out)
    return Analysis(body, coupling, own, inputs, outputs, list(values.values()), out_tree)


def first_uses(analysis: Analysis) -> list[str]:
    """The paths of parameters in the order in which the function reads them."""
    found: dict[str, None] = {}

    def visit(body: Body, paths: dict[core.Var, str]) -> None:
        for node in body.nodes:
            own = [None if isinstance(v, core.Literal) else paths.get(v) for v in node.eqn.invars]
            if not node.bodies:
                found.update(dict.fromkeys(p for p in own if p is not None))
            for inner in node.bodies:
                names = inner.jaxpr.invars
                pairs = zip(names, own[len(own) - len(names) :], strict=False)
                visit(inner, {v: p for v, p in pairs if p is not None})

    invars = analysis.body.jaxpr.invars
    visit(analysis.body, dict(zip(invars, analysis.params, strict=False)))
    return [*found, *(path for path in analysis.params if path not in found)]


def emptied(gone: Mapping[str, Sequence[np.ndarray]]) -> set[str]:
    """The parameters that go as a whole: of which no index of the first axis stays."""
    return {path for path, flags in gone.items() if len(flags) and len(flags[0]) and all(flags[0])}


def seeds_of(analysis: Analysis, gone: Mapping[str, Sequence[np.ndarray]]) -> set[int]:
    """The components of indices of parameters, but of those that go as a whole."""
    component, whole = analysis.coupling.component, emptied(gone)
    return {
        x
        for path, flags in gone.items()
        if path not in whole
        for axis, own in zip(analysis.params[path], flags, strict=True)
        for x in component[axis[own]].tolist()
    }
