"""How far a rewritten function is from its reference."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.lift import lift
from jaxopt_compress.tree.paths import named_leaves
from jaxopt_compress.typing import Leaf, PyTree


class Difference(NamedTuple):
    """The largest difference between a rewritten function and its reference.

    Attributes:
        absolute: The largest absolute difference of an output.
        relative: That over the largest magnitude of the reference's same output.
    """

    absolute: float
    relative: float


def difference(got: PyTree, reference: PyTree, tolerance: float | None) -> Difference:
    """Measures; raises where the relative difference is above ``tolerance``."""
    absolute = relative = 0.0
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(reference), strict=True):
        apart = float(jnp.max(jnp.abs(jnp.asarray(x) - jnp.asarray(y)), initial=0.0))
        size = float(jnp.max(jnp.abs(jnp.asarray(y)), initial=0.0))
        share = apart / size if size else (0.0 if apart == 0 else float("inf"))
        # `not <=`, so that NaN counts.
        if not apart <= absolute:
            absolute = apart
        if not share <= relative:
            relative = share
    if tolerance is not None and not relative <= tolerance:
        raise ValueError(
            f"the rewritten function differs from its reference by {relative:.3g} of the largest "
            f"output, more than tolerance={tolerance}"
        )
    return Difference(absolute, relative)


def check_results(
    self: Any,
    fn: Callable[..., PyTree],
    *args: PyTree,
    tolerance: float | None = None,
    **kwargs: Any,
) -> Difference:
    """Measures the rewritten function of the new parameters against ``fn`` of the original ones.

    Args:
        self: The rewrite.
        fn: A function of the original parameters.
        *args: Its other arguments.
        tolerance: The largest relative difference that does not raise; None never raises.
        **kwargs: Further arguments.

    Returns:
        The largest absolute and relative difference, with that of compressed parameters.
    """
    got = lift(self.function(fn))(self.params, *args, **kwargs)
    return difference(got, fn(self.original, *args, **kwargs), tolerance)


def change_leaves(original: PyTree, change: Callable[[str, Leaf], Leaf], x: PyTree) -> PyTree:
    """Maps path and leaf of a tree whose leaves stand beside those of ``original``."""
    treedef = jax.tree.structure(original)
    names = [path for path, _ in named_leaves(original)]
    return treedef.unflatten(map(change, names, treedef.flatten_up_to(x)))
