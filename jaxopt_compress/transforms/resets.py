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


def without_moments(rests: dict[str, jax.Array], params: PyTree, inner_state: PyTree) -> Any:
    """An optimizer's state with moments of 0 at rest, for the optimizer to read.

    In what it returns they would be written a second time. Moments are found by what ends their
    path and by their shape, so in whatever wrapper they are.
    """
    if not rests:
        return inner_state
    masks = map_named(lambda path, w: rests.get(path, False), params)
    ends = {key: mask for key, mask in jax.tree_util.tree_leaves_with_path(masks)}

    def moment(key: Any, x: Leaf) -> Leaf:
        # The longest end, since "bias" ends the path of "head/bias" too.
        found = next((ends[key[i:]] for i in range(len(key) + 1) if key[i:] in ends), False)
        if found is False or jnp.shape(found) != jnp.shape(x):
            return x
        return jnp.where(found, jnp.zeros((), x.dtype), x)

    return jax.tree_util.tree_map_with_path(moment, inner_state)


def to_zero(rests: dict[str, jax.Array], updates: PyTree, params: PyTree) -> Any:
    """Updates that end at 0 at rest."""
    values = dict(named_leaves(params))
    end = lambda path, u: jnp.where(rests[path], -values[path], u).astype(u.dtype)
    return map_named(lambda path, u: end(path, u) if path in rests else u, updates)
