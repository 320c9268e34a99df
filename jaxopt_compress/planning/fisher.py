"""Squared gradients: the diagonal of the empirical Fisher information."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.tree import map_named, named_leaves
from jaxopt_compress.typing import PyTree


def squared_gradients(
    loss: Callable[..., jax.Array],
    params: PyTree,
    paths: set[str],
    batches: Sequence[tuple[PyTree, ...]],
) -> dict[str, jax.Array]:
    """Path -> the mean over batches of the squared gradient of each entry, in float32.

    Args:
        loss: ``loss(params, *batch) -> scalar``.
        params: A pytree.
        paths: Of which parameters.
        batches: Tuples of arguments, of one shape.
    """

    @jax.jit
    def add(total: dict[str, jax.Array], params: Any, *batch: Any) -> dict[str, jax.Array]:
        chosen = {path: w for path, w in named_leaves(params) if path in paths}
        at = lambda own: loss(map_named(lambda p, w: own.get(p, w), params), *batch)
        grads = jax.grad(at)(chosen)
        return {p: t + jnp.square(grads[p].astype(jnp.float32)) for p, t in total.items()}

    total = {p: jnp.zeros(w.shape) for p, w in named_leaves(params) if p in paths}
    for batch in batches:
        total = add(total, params, *batch)
    return {path: t / len(batches) for path, t in total.items()}


def check_some(**batches: Sequence[Any]) -> None:
    """Refuses sequences of batches, by their names, of which there are none."""
    for name, each in batches.items():
        if not each:
            raise ValueError(f"{name} is empty: losses are means over one batch at least")
