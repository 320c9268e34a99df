"""Numbers about a compression in training, for logs."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import is_compressed, materialize
from jaxopt_compress.compression.leaf_states import apply_leaves, factor_owner, map_states
from jaxopt_compress.compression.states import compression_states, method_states
from jaxopt_compress.numerics.codes import round_to_grid
from jaxopt_compress.quantization.products import ProductState
from jaxopt_compress.quantization.state import QuantizedState
from jaxopt_compress.tree import named_leaves
from jaxopt_compress.tree.paths import is_float
from jaxopt_compress.typing import Leaf, PyTree


def scalars(state_or_view: Any, params: PyTree) -> dict[str, jax.Array]:
    """Sparsity, range and share of clipped entries of each compressed parameter.

    A pure function without callbacks: call it in the jitted step, or beside it, and give what it
    returns to any logger.

    Args:
        state_or_view: The state of an optimizer with `compressed_training`, or of a compression; or
            a tree like ``params``, such as a view or a compressed tree.
        params: The parameters that the optimizer updates.

    Returns:
        Name -> float32 scalar: ``"path/sparsity"``, the share of zeros that the forward pass sees;
        ``"path/low"`` and ``"path/high"``, the smallest and largest entry that it sees;
        ``"path/error"``, the distance to the parameter over its norm; from a state also
        ``"path/clipped"``, the share of entries beyond the ends of their grid; and ``"sparsity"``
        of all of them together; for a view, floating leaves of rank 2 and more.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jnp.array([[0.1, -4.0], [3.0, 0.5]])}
        >>> c = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5))
        >>> found = jax.jit(jc.scalars)(c.init(params), params)
        >>> {name: round(float(x), 3) for name, x in found.items()}
        {'sparsity': 0.5, 'w/error': 0.101, 'w/high': 3.0, 'w/low': -4.0, 'w/sparsity': 0.5}
    """
    if method_states(state_or_view):
        seen, clipped, chosen = _of_states(state_or_view, params)
    else:
        seen, clipped = dict(named_leaves(state_or_view)), {}
        chosen = [p for p, w in named_leaves(params) if is_float(w) and len(w.shape) > 1]
    own, found = dict(named_leaves(params)), {}
    zeros, count = jnp.zeros(()), 0
    for path in chosen:
        new, old = (materialize(x[path]).astype(jnp.float32) for x in (seen, own))
        norm = jnp.linalg.norm(old)
        found[f"{path}/sparsity"] = jnp.mean(new == 0, dtype=jnp.float32)
        found[f"{path}/low"], found[f"{path}/high"] = jnp.min(new), jnp.max(new)
        found[f"{path}/error"] = jnp.linalg.norm(new - old) / jnp.where(norm > 0, norm, 1)
        zeros, count = zeros + found[f"{path}/sparsity"] * new.size, count + new.size
    found |= {f"{path}/clipped": share for path, share in clipped.items()}
    return found | ({"sparsity": zeros / count} if count else {})


def _of_states(
    state: PyTree, params: PyTree
) -> tuple[dict[str, Any], dict[str, jax.Array], list[str]]:
    """The view of all methods by path, the clipped shares, and the parameters that they take."""
    paths, clipped = [path for path, _ in named_leaves(params)], {}
    chosen: list[str] = []

    def note(path: str, w: Leaf, leaf: Leaf, learned: PyTree) -> Leaf:
        chosen.append(factor_owner(path, paths))
        if isinstance(leaf, ProductState):  # Its activations have grids of their own.
            leaf, learned = leaf.weights, (learned or {}).get("weight")
        current = getattr(leaf, "current", None)
        if isinstance(getattr(leaf, "grid", None), QuantizedState) and current is not None:
            clipped[path] = _clipped(w, current(learned))
        return w

    view = params
    for each in (s for whole in compression_states(state) for s in method_states(whole)):
        learned = each.learned
        map_states(lambda p, w, leaf, own=learned: note(p, w, leaf, own.get(p)), view, each)
        view = apply_leaves(view, each, materialize=False)
    return dict(named_leaves(view)), clipped, list(dict.fromkeys(chosen))


def _clipped(w: Leaf, grid: QuantizedState) -> jax.Array:
    """The share of entries that the ends of the grid move."""
    values = w.materialize() if is_compressed(w) else w
    _, inside = round_to_grid(values, *grid.spread(values.shape), grid.format)
    return jnp.mean(~inside, dtype=jnp.float32)
