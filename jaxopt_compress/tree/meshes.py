"""Running what has no rule for explicit mesh axes on arrays that have them."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.typing import Leaf, PyTree


def on_auto_axes(fn: Callable[..., PyTree], *args: PyTree) -> Any:
    """``fn(*args)``, outside of jit, with the compiler to choose shardings in between.

    Packing, sorting and decompositions have no rule for axes of a mesh whose type is explicit.
    Arrays are seen as if those axes were automatic, and results come back on the mesh as it was;
    nothing is moved for that. Other arguments, and all of them under a trace, are left as they are.

    Args:
        fn: A function of trees.
        *args: Trees, with arrays on one mesh.
    """
    leaves = jax.tree.leaves(args)
    meshes = [m for m in map(_explicit, leaves) if m is not None]
    if not meshes or any(map(is_traced, leaves)):
        return fn(*args)
    mesh = meshes[0]
    automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)

    def moved(tree: PyTree, source: Mesh, target: Mesh) -> PyTree:
        def move(x: Leaf) -> Leaf:
            own = x.sharding if isinstance(x, jax.Array) else None
            if not isinstance(own, NamedSharding) or own.mesh != source:
                return x
            return jax.device_put(x, NamedSharding(target, own.spec, memory_kind=own.memory_kind))

        return jax.tree.map(move, tree)

    with jax.set_mesh(automatic):
        result = fn(*moved(args, mesh, automatic))
    return moved(result, automatic, mesh)


def reduced_on_auto_axes(fn: Callable[[jax.Array], PyTree], w: jax.Array) -> Any:
    """``fn(w)``, the compiler choosing shardings in between where types would have to say them.

    Along each axis results are split as ``w`` is where they have as many entries, or groups of them
    that the devices share evenly, and are whole elsewhere.

    Args:
        fn: A function of one array, whose results have its rank.
        w: The array.
    """
    sharding = getattr(jax.typeof(w), "sharding", None)
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return fn(w)
    mesh, spec = sharding.mesh, (*sharding.spec, *(None,) * (w.ndim - len(sharding.spec)))

    def split(n: int, d: int) -> Any:
        names = (spec[d],) if isinstance(spec[d], str) else spec[d] or ()
        parts = math.prod(mesh.shape[name] for name in names)
        return spec[d] if n == w.shape[d] or (n > 1 and n % parts == 0) else None

    shapes = jax.eval_shape(fn, jax.ShapeDtypeStruct(w.shape, w.dtype))
    specs = jax.tree.map(lambda y: PartitionSpec(*map(split, y.shape, range(w.ndim))), shapes)
    return jax.sharding.auto_axes(fn, out_sharding=specs)(w)


def _explicit(x: Leaf) -> Mesh | None:
    """The mesh of a concrete array, if the type of one of its axes is explicit."""
    mesh = getattr(getattr(x, "sharding", None), "mesh", None)
    if not isinstance(mesh, Mesh) or AxisType.Explicit not in mesh.axis_types:
        return None
    return mesh
