"""Splitting a tree into the leaves to differentiate and the rest."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.arrays.base import memory_bytes, stored_bytes
from jaxopt_compress.tree.globs import glob_matches
from jaxopt_compress.tree.paths import is_float, map_named, path_of
from jaxopt_compress.typing import Leaf, PyTree


def partition(tree: PyTree, where: str | Sequence[str] | None = None) -> tuple[Any, Any]:
    """Splits a tree into its floating arrays and everything else.

    Inside compressed arrays, scales and factors are floats, codes and masks are not. Optimizers and
    `jax.grad` take the first half, so that codes cannot be added to or scaled by accident; given
    the whole tree they raise errors of their own, such as "grad requires real- or complex-valued
    inputs (...) but got int8".

    Args:
        tree: Any.
        where: Globs of the paths of floating arrays, fields of compressed arrays included, such as
            ``"**/parts/1/*"`` for adapters beside a frozen weight. By default all.

    Returns:
        ``(floats, rest)``: the structure of ``tree``, with None where the other half has the leaf.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> small = jc.compress({"w": jnp.ones((4, 2))}, jc.quantize("int8"))
        >>> floats, rest = jc.partition(small)
        >>> floats["w"].codes is None, rest["w"].scale is None
        (True, True)
        >>> loss = jc.lift(lambda params, x: jnp.sum(x @ params["w"]))
        >>> at_floats = lambda floats: loss(jc.combine(floats, rest), jnp.ones((3, 4)))
        >>> jax.grad(at_floats)(floats)["w"].scale.shape
        (1, 2)
    """
    globs = ("**",) if where is None else (where,) if isinstance(where, str) else tuple(where)
    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [path_of(keys) for keys, _ in keyed]
    for glob in globs:
        if where is not None and not any(glob_matches(glob, path) for path in paths):
            raise ValueError(
                f"where={glob!r} matches none of the arrays, such as {', '.join(paths[:8])}"
            )
    taken = [
        is_float(x) and (where is None or any(glob_matches(g, path) for g in globs))
        for path, (_, x) in zip(paths, keyed, strict=True)
    ]
    leaves = [x for _, x in keyed]
    half = lambda side: [x if own == side else None for x, own in zip(leaves, taken, strict=True)]
    return treedef.unflatten(half(True)), treedef.unflatten(half(False))


def combine(floats: PyTree, rest: Any) -> PyTree:
    """Inverts `partition`: each leaf from the half that has it.

    Args:
        floats: A tree with None where ``rest`` has the leaf.
        rest: A tree of the same structure, with None where ``floats`` has the leaf.

    Example:
        >>> combine({"w": 1.0, "step": None}, {"w": None, "step": 2})
        {'step': 2, 'w': 1.0}
    """

    def either(a, b):
        return b if a is None else a

    return jax.tree.map(either, floats, rest, is_leaf=lambda x: x is None)


def nbytes(tree: PyTree) -> int:
    """Bytes that a file needs for the leaves of a tree, codes packed to their true width.

    Example:
        >>> import jax.numpy as jnp
        >>> nbytes({"codes": jnp.zeros((3, 5), jnp.int4), "scale": jnp.zeros(5)})
        28
    """
    return sum(stored_bytes(x) for x in _arrays(tree))


def resident_bytes(tree: PyTree) -> int:
    """Bytes that the leaves of a tree take in memory on the backend that holds them.

    Example:
        >>> import jax.numpy as jnp
        >>> resident_bytes({"w": jnp.zeros((3, 5), jnp.bfloat16)})
        30
    """
    return sum(memory_bytes(x) for x in _arrays(tree))


def shard(tree: PyTree, shardings: PyTree) -> PyTree:
    """Places a tree as its dense form would be placed.

    Of shapes, as from `jax.eval_shape`, it makes shapes with shardings, from which programs for
    any number of devices are compiled without having one of them.

    Args:
        tree: A pytree of arrays and compressed arrays, or of `jax.ShapeDtypeStruct`.
        shardings: One `jax.sharding.NamedSharding` for all leaves, or a tree of them, with the
            dense structure (one sharding per compressed array).

    Returns:
        The tree, its arrays on the devices; each field of a compressed array is split along the
        axes that it shares with the dense array and copied along the others.

    Raises:
        ValueError: A compressed form cannot be split as asked; names its path.

    Example:
        >>> import jaxopt_compress as jc
        >>> from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
        >>> params = {"w": jax.ShapeDtypeStruct((8192, 4096), "bfloat16")}
        >>> small = jax.eval_shape(lambda p: jc.compress(p, jc.quantize("int4", 128)), params)
        >>> mesh = AbstractMesh((256,), ("model",))
        >>> placed = shard(small, NamedSharding(mesh, PartitionSpec(None, "model")))
        >>> placed["w"].codes.sharding.shard_shape(placed["w"].codes.shape)
        (8192, 16)
    """
    if isinstance(shardings, jax.sharding.Sharding):
        return map_named(lambda path, x: _place(path, x, shardings), tree)
    return map_named(_place, tree, shardings)


def _place(path: str, leaf: Leaf, sharding: jax.sharding.Sharding | None) -> Leaf:
    if not (is_compressed(leaf) and isinstance(sharding, NamedSharding)):
        return _put(leaf, sharding)

    def named(spec):
        return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)

    try:
        specs = leaf.specs(sharding.spec)

        def is_spec(x):
            return isinstance(x, PartitionSpec)

        return jax.tree.map(_put, leaf, jax.tree.map(named, specs, is_leaf=is_spec))
    except ValueError as error:
        raise ValueError(
            f"cannot place {path!r} of shape {leaf.shape} by {sharding.spec}: {error}"
        ) from error


def _put(x: Leaf, sharding: jax.sharding.Sharding | None) -> Leaf:
    if not isinstance(x, jax.ShapeDtypeStruct):
        return jax.device_put(x, sharding)
    if sharding is not None:
        sharding.shard_shape(x.shape)  # Raises where it does not divide.
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _arrays(tree: PyTree) -> list[Any]:
    leaves = jax.tree.leaves(tree, is_leaf=is_compressed)
    return [x for x in leaves if is_compressed(x) or hasattr(x, "dtype")]
