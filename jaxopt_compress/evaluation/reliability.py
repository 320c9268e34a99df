"""How far the confidence of a classifier is from its accuracy."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.evaluation.metric import Metric
from jaxopt_compress.evaluation.scores import right
from jaxopt_compress.evaluation.sums import quotient, spread


@functools.cache
def calibration_error(bins: int = 15) -> Metric:
    r"""The expected calibration error of the highest probability.

    .. math:: \sum_b \frac{n_b}{n} \, | \mathrm{accuracy}_b - \mathrm{confidence}_b |

    over bins of equal width of the confidence, each open below. Its value depends on the number of
    bins, so that only figures of the same number can be compared.

    Args:
        bins: How many.

    References:
        Guo et al., 2017, On Calibration of Modern Neural Networks.
    """
    if bins < 1:
        raise ValueError(f"bins={bins}; there is at least one")
    edges = np.linspace(0, 1, bins + 1)[1:-1].astype(np.float32)

    def measure(
        scores: jax.Array, targets: jax.Array, weights: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        hits = right(scores, targets).ravel()
        confidence = jnp.max(jax.nn.softmax(scores.astype(jnp.float32)), axis=-1).ravel()
        ones = jnp.ones(targets.shape) if weights is None else spread(weights, targets.shape)
        weight = ones.ravel().astype(jnp.float32)
        confidence = jnp.where(weight == 0, 0, confidence)
        at = jnp.searchsorted(jnp.asarray(edges), confidence)
        add = lambda values: jnp.zeros(bins).at[at].add(weight * values)
        return add(hits), add(confidence), add(1.0)

    def result(sums: Sequence[np.ndarray]) -> float:
        hits, confidence, weight = sums
        return quotient((np.abs(hits - confidence).sum(), weight.sum()))

    return Metric("calibration_error", measure, result)
