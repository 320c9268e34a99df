"""Entries of parameters that training holds at 0, and their moments."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.compression.states import method_states
from jaxopt_compress.tree import map_named, named_leaves
from jaxopt_compress.typing import Leaf, PyTree


def resting(state: PyTree) -> dict[str, jax.Array]:
    """Path -> booleans, true where a compression wants the parameter itself to be 0."""
    leaves = [pair for own in method_states(state) for pair in own.leaves.items()]
    found = {path: leaf.rests() for path, leaf in leaves}
    return {path: mask for path, mask in found.items() if mask is not None}


def check_resting(params: PyTree, state: PyTree) -> None:
    """Refuses pruned entries of leaves other than parameters.

    Raises:
        ValueError: Names the path.
    """
    known = {path for path, _ in named_leaves(params)}
    if other := sorted(resting(state).keys() - known):
        raise ValueError(
            f"{other[0]!r} is not a parameter but a learned factor, whose pruned entries cannot be "
            "set to 0: prune it with pruned='stay' and without grow="
        )


def at_rest(
    updates: PyTree, params: PyTree, inner_state: PyTree, state: PyTree, new: Leaf
) -> tuple[Any, Any]:
    """Updates that end at 0 where entries rest, and an optimizer's state with 0 there.

    Moments are found by what ends their path and by their shape, so in whatever wrapper they are.

    Args:
        updates: What the optimizer wants to add.
        params: The parameters.
        inner_state: The state of the optimizer.
        state: The state of the compression before the update; entries at rest in it begin at 0.
        new: The state after it.
    """
    before = resting(state)
    rests = {path: mask | before[path] for path, mask in resting(new).items()}
    if not rests:
        return updates, inner_state
    values = dict(named_leaves(params))

    def to_zero(path: str, u: Leaf) -> Leaf:
        return jnp.where(rests[path], -values[path], u).astype(u.dtype) if path in rests else u

    masks = map_named(lambda path, w: rests.get(path, False), params)
    ends = {key: mask for key, mask in jax.tree_util.tree_leaves_with_path(masks)}

    def moment(key: Any, x: Leaf) -> Leaf:
        # The longest end, since "bias" ends the path of "head/bias" too.
        found = next((ends[key[i:]] for i in range(len(key) + 1) if key[i:] in ends), False)
        if found is False or jnp.shape(found) != jnp.shape(x):
            return x
        return jnp.where(found, jnp.zeros((), x.dtype), x)

    moved = jax.tree_util.tree_map_with_path(moment, inner_state)
    return map_named(to_zero, updates), moved
