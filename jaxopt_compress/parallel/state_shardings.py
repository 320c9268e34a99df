"""How optimizer and compression states are split over a mesh."""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxopt_compress.tree import map_named, named_leaves
from jaxopt_compress.typing import Leaf, PyTree


def state_shardings(state: PyTree, params: PyTree, shardings: Any) -> Any:
    """Shardings of an optimizer's state, which follow those of the parameters.

    What is kept of a parameter, such as a moment, a mask or a scale, has the parameter's path in
    its own. It is split along the axes that it shares with the parameter, and along axes of groups
    if the devices share these evenly. Everything else is the same on all devices.

    Args:
        state: A state of any optimizer, `compressed_training` and `small_states` included; or its
            abstract form, ``jax.eval_shape(tx.init, params)``.
        params: The parameters, or their shapes.
        shardings: One `jax.sharding.NamedSharding` for all of them, or a tree of them, as `shard`
            takes it.

    Returns:
        One sharding for each leaf of the state, as `shard` takes it.

    Example:
        >>> import jax, optax, jaxopt_compress as jc
        >>> from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
        >>> params = {"w": jax.ShapeDtypeStruct((512, 256), "float32")}
        >>> columns = NamedSharding(AbstractMesh((8,), ("model",)), PartitionSpec(None, "model"))
        >>> tx = jc.compressed_training(optax.adam(1e-3), jc.quantize("int8"))
        >>> state = jax.eval_shape(tx.init, params)
        >>> state = jc.shard(state, jc.state_shardings(state, params, columns))
        >>> state.inner[0].mu["w"].sharding.spec
        P(None, 'model')
    """
    if isinstance(shardings, NamedSharding):
        one = shardings
        shardings = map_named(lambda path, _: one, params)
    owners: dict[str, tuple[tuple[int, ...], NamedSharding]] = {}
    for (path, leaf), own in zip(
        named_leaves(params), jax.tree.leaves(shardings, is_leaf=_is_sharding), strict=True
    ):
        owners[path] = tuple(leaf.shape), own
    mesh = next(iter(owners.values()))[1].mesh
    everywhere = NamedSharding(mesh, PartitionSpec())

    def one_of(path: str, leaf: Leaf) -> NamedSharding:
        # The longest path, since "bias" is in the path of "head/bias" too.
        found = [p for p in owners if f"/{p}/" in f"/{path}/"]
        if not found:
            return everywhere
        shape, own = owners[max(found, key=len)]
        return NamedSharding(own.mesh, _spec_like(tuple(leaf.shape), shape, own))

    return map_named(one_of, state)


def _is_sharding(x: Leaf) -> bool:
    return isinstance(x, NamedSharding)


def _spec_like(shape: tuple[int, ...], owner: tuple[int, ...], own: NamedSharding) -> PartitionSpec:
    """The spec of an array that shares some axes with its owner."""
    if len(shape) != len(owner):
        return PartitionSpec()
    spec = (*own.spec, *(None,) * (len(shape) - len(own.spec)))

    def split(d: int) -> Any:
        names = (spec[d],) if isinstance(spec[d], str) else spec[d] or ()
        parts = math.prod(own.mesh.shape[name] for name in names)
        even = shape[d] > 1 and shape[d] % parts == 0
        return spec[d] if shape[d] == owner[d] or even else None

    return PartitionSpec(*map(split, range(len(shape))))
