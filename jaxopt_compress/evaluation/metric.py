"""Metrics, and the mean of a function over examples."""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxopt_compress.evaluation.sums import count, quotient, weighted_sum
from jaxopt_compress.typing import PyTree


class Metric(NamedTuple):
    """A figure of all examples of all batches.

    It is part of the key of the compiled program: take functions of a module, not ones made anew
    for each call.

    Attributes:
        name: Under which it is returned.
        measure: ``measure(outputs, targets, weights)`` of one batch: a tree of arrays. It is
            compiled; ``weights`` are None or of the shape ``[*examples]``.
        result: ``result(tree)``: the figure, from the sums over batches as NumPy arrays, float64
            or int64; or a dict of lists of figures, such as one per class.
        keep: Whether arrays are kept and joined along their first axis, for what sums cannot tell,
            such as ranks. Memory then grows with the number of examples.
        values: ``values(outputs, targets)``, one per example, where the figure is their mean;
            `compare` then tests whether differences are more than noise. None otherwise.
    """

    name: str
    measure: Callable[[PyTree, PyTree, jax.Array | None], PyTree]
    result: Callable[[PyTree], PyTree]
    keep: bool = False
    values: Callable[[PyTree, PyTree], jax.Array] | None = None


Metrics = Iterable[str | Callable[..., ArrayLike] | Metric]


@functools.cache
def mean(function: Callable[[PyTree, PyTree], jax.Array], name: str | None = None) -> Metric:
    """The weighted mean of ``function(outputs, targets)``, an array ``[*examples]``.

    What `evaluate` makes of a plain function.

    Args:
        function: One value per example.
        name: The name of the metric; by default the function's.
    """
    called: str = name or getattr(function, "__name__", type(function).__name__)

    def measure(
        outputs: PyTree, targets: PyTree, weights: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        values = jnp.asarray(function(outputs, targets))
        if values.ndim == 0:
            raise ValueError(
                f"the metric {called!r} returns a scalar: return one value per example, and the "
                "mean over all batches is taken"
            )
        return weighted_sum(values, weights), count(values.shape, weights)

    return Metric(called, measure, quotient, values=function)
