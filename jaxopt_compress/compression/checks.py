"""Checks before anything is computed."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.lift import Stats, Uses
from jaxopt_compress.typing import Leaf, PyTree


class NeedsValues(ValueError):
    """Something is decided from values, which are not known while a function is traced."""


class NeedsStats(ValueError):
    """Something starts from activations, and no statistics of them were given."""


def check_init(
    init: Callable[..., PyTree], params: PyTree, uses: Uses | None, stats: Stats | None
) -> None:
    """Runs an ``init`` of several steps on shapes alone: none refuses after another's work.

    It ends early, and silently, at a step that needs values.
    """
    leaves, treedef = jax.tree.flatten(params)
    if any(is_traced(x) for x in leaves):
        return  # Nothing is computed yet.
    at = [i for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")]

    def run(arrays: list[Any]) -> None:
        new = dict(zip(at, arrays, strict=True))
        tree = jax.tree.unflatten(treedef, [new.get(i, x) for i, x in enumerate(leaves)])
        init(tree, uses=uses, stats=stats)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The real run repeats them.
        try:
            # Without shardings, which are explicit in some types and rule some operations out.
            types = [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) for i in at]
            jax.eval_shape(run, types)
        except (NeedsValues, jax.errors.JAXTypeError):
            pass


def check_finite(path: str, w: Leaf) -> None:
    """Refuses infinities and NaNs, where the values are known.

    Raises:
        ValueError: Names the path and how many there are.
    """
    if is_compressed(w) or is_traced(w) or not w.size:
        return
    with jax.ensure_compile_time_eval():  # The values may be constants of a traced function.
        # Steps are float32, whose range float64 values may leave.
        bad = int(jnp.sum(~jnp.isfinite(w.astype(jnp.float32))))
    if bad:
        raise ValueError(
            f"{path!r} of shape {tuple(w.shape)} holds {bad} entries that are infinite, NaN or "
            "beyond float32's range, which no compressed form can hold; repair the checkpoint or "
            "exclude this leaf"
        )
