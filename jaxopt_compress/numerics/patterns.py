"""Masks that keep ``n`` of each ``m`` consecutive entries."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxopt_compress.numerics.ranking import check_scores, magnitude_patterns


@functools.partial(jax.jit, static_argnames=("n", "m", "axis"))
def _n_m(scores, n, m, axis):
    before, length, after = scores.shape[:axis], scores.shape[axis], scores.shape[axis + 1 :]
    pad = -length % m
    x = magnitude_patterns(scores)
    if pad:
        # Padding ranks below every score, so a ragged group keeps min(n, its length).
        x = lax.pad(x, jnp.asarray(-1, x.dtype), [(0, pad * (d == axis), 0) for d in range(x.ndim)])
    x = x.reshape(*before, (length + pad) // m, m, *after)
    entry, other = jnp.expand_dims(x, axis + 2), jnp.expand_dims(x, axis + 1)
    index = jnp.arange(m)
    earlier = (index[None, :] < index[:, None]).reshape(
        *(1,) * (axis + 1), m, m, *(1,) * len(after)
    )
    wins = (other > entry) | ((other == entry) & earlier)
    mask = jnp.sum(wins, axis + 2, dtype=jnp.int32) < n
    mask = mask.reshape(*before, length + pad, *after)
    return lax.slice_in_dim(mask, 0, length, axis=axis) if pad else mask


def n_m_mask(scores: ArrayLike, n: int, m: int, axis: int) -> jax.Array:
    """Mask of the ``n`` largest of each ``m`` consecutive entries along ``axis``.

    An entry is kept if fewer than ``n`` of its group are larger, or equal with a lower index: one
    fused pass of ``m`` comparisons an entry. Under a sharding nothing is communicated as long as
    each shard holds whole groups.

    Args:
        scores: Floats, in the order of `numerics.ranking`.
        n: Entries kept in each group.
        m: Group size. A ragged last group of ``r`` entries keeps ``min(n, r)``.
        axis: Axis along which the groups lie, usually the contracting one.

    Returns:
        Bool array of the scores' shape.

    Raises:
        ValueError: ``1 <= n <= m`` does not hold, or the axis does not exist.
        TypeError: The scores are not floats of at least 16 bits.

    Example:
        >>> n_m_mask(jnp.array([1.0, 4.0, 4.0, 4.0, 7.0]), 2, 4, axis=0).tolist()
        [False, True, True, False, True]

    References:
        Mishra et al. (2021), Accelerating Sparse Deep Neural Networks.
    """
    scores = jnp.asarray(scores)
    check_scores(scores, 0)
    if not 1 <= n <= m:
        raise ValueError(f"pattern {n}:{m}; n must lie in 1..m, for example 2:4")
    if not -scores.ndim <= axis < scores.ndim:
        raise ValueError(
            f"axis={axis} for scores of shape {scores.shape}; "
            f"it must lie in {-scores.ndim}..{scores.ndim - 1}"
        )
    return _n_m(scores, n, m, axis % scores.ndim)
