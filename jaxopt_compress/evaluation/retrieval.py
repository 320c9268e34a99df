"""Metrics of rankings: which items come first, for each query."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.evaluation.metric import Metric, mean
from jaxopt_compress.evaluation.ranks import check_same


@functools.cache
def precision_at(k: int) -> Metric:
    """The share of the first ``k`` items that are relevant, a mean over queries.

    Outputs are scores ``[*queries, items]`` and targets relevances of the same shape, 0 for items
    that are none. Among equal scores the first items are taken.

    Args:
        k: How many items are looked at; at most all.

    Raises:
        ValueError: In a call, there are fewer than ``k`` items.
    """

    def share(scores: jax.Array, relevance: jax.Array) -> jax.Array:
        return jnp.mean(_first("precision_at", k, scores, relevance) > 0, axis=-1)

    return mean(share, f"precision@{k}")


@functools.cache
def recall_at(k: int) -> Metric:
    """The share of relevant items that are among the first ``k``, a mean over queries.

    Args:
        k: As in `precision_at`. A query without relevant items has 0; give it weight 0 to leave it
            out.

    Raises:
        ValueError: In a call, there are fewer than ``k`` items.
    """

    def share(scores: jax.Array, relevance: jax.Array) -> jax.Array:
        found = jnp.sum(_first("recall_at", k, scores, relevance) > 0, axis=-1)
        return found / jnp.maximum(jnp.sum(relevance > 0, axis=-1), 1)

    return mean(share, f"recall@{k}")


@functools.cache
def ndcg_at(k: int) -> Metric:
    r"""The normalized discounted cumulative gain, a mean over queries.

    .. math:: \sum_{i=1}^{k} \frac{r_{(i)}}{\log_2 (i + 1)}

    of relevances in the order of the scores, over that of the best order.

    Args:
        k: As in `precision_at`. A query without relevant items has 0, as in scikit-learn.

    Raises:
        ValueError: In a call, there are fewer than ``k`` items.

    References:
        Järvelin and Kekäläinen, 2002, Cumulated Gain-Based Evaluation of IR Techniques.
    """

    def gain(scores: jax.Array, relevance: jax.Array) -> jax.Array:
        discount = 1 / jnp.log2(jnp.arange(2.0, k + 2))
        # Sums of products, not products of matrices, which are less precise on accelerators.
        gained = jnp.sum(_first("ndcg_at", k, scores, relevance) * discount, axis=-1)
        ideal = jnp.sum(lax.top_k(relevance.astype(jnp.float32), k)[0] * discount, axis=-1)
        return jnp.where(ideal > 0, gained / jnp.where(ideal > 0, ideal, 1), 0)

    return mean(gain, f"ndcg@{k}")


def _first(name: str, k: int, scores: jax.Array, relevance: jax.Array) -> jax.Array:
    """The relevances of the ``k`` items of the highest scores, float32; 0 where a score is NaN."""
    check_same(scores, relevance)
    if not scores.ndim or not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"{name}({k}) of scores of shape {tuple(scores.shape)}: [*queries, items]")
    at = lax.top_k(scores, k)[1]
    found = jnp.take_along_axis(relevance.astype(jnp.float32), at, axis=-1)
    return jnp.where(jnp.any(jnp.isnan(scores), axis=-1, keepdims=True), 0.0, found)
