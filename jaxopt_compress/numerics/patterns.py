"""Masks that keep ``n`` of each ``m`` consecutive entries."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxopt_compress.numerics.ranking import check_scores, magnitude_patterns


@functools.partial(jax.jit, static_argnames=("n", "m", "axis"))
def _n_m(scores, n, m, axis):
    # Padding ranks below every score, so a ragged group keeps min(n, its length).
    mask = _ranks(_grouped(magnitude_patterns(scores), m, axis, -1), axis) < n
    return _joined(mask, scores.shape, axis)


def _grouped(x, m, axis, fill):
    """Groups along an axis as two axes, the last one filled up."""
    pad = -x.shape[axis] % m
    if pad:
        x = lax.pad(
            x, jnp.asarray(fill, x.dtype), [(0, pad * (d == axis), 0) for d in range(x.ndim)]
        )
    return x.reshape(*x.shape[:axis], x.shape[axis] // m, m, *x.shape[axis + 1 :])


def _joined(x, shape, axis):
    x = x.reshape(*shape[:axis], math.prod(x.shape[axis : axis + 2]), *shape[axis + 1 :])
    return x if x.shape == shape else lax.slice_in_dim(x, 0, shape[axis], axis=axis)


def _ranks(x, axis):
    """How many of its group come before each entry, of groups along ``axis + 1``."""
    entry, other = jnp.expand_dims(x, axis + 2), jnp.expand_dims(x, axis + 1)
    index = jnp.arange(x.shape[axis + 1])
    earlier = index[None, :] < index[:, None]
    earlier = earlier.reshape(*(1,) * (axis + 1), *earlier.shape, *(1,) * (x.ndim - axis - 2))
    wins = (other > entry) | ((other == entry) & earlier)
    return jnp.sum(wins, axis + 2, dtype=jnp.int32)


def n_m_mask(scores: ArrayLike, n: int, m: int, axis: int) -> jax.Array:
    """Mask of the ``n`` largest of each ``m`` consecutive entries along ``axis``.

    An entry is kept if fewer than ``n`` of its group are larger, or equal with a lower index: one
    fused pass of ``m`` comparisons an entry. Under a sharding nothing is communicated as long as
    each shard holds whole groups.

    Args:
        scores: Floats, in the order of `numerics.ranking`.
        n: Entries kept in each group.
        m: Group size. A ragged last group of ``r`` entries keeps ``min(n, r)``.
        axis: The axis of the groups, usually the contracting one.

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


@functools.partial(jax.jit, static_argnames=("n", "m", "axis"))
def n_m_exchange(
    scores: jax.Array,
    growth: jax.Array,
    mask: jax.Array,
    allowed: jax.Array,
    count: jax.Array,
    n: int,
    m: int,
    axis: int,
) -> jax.Array:
    """Drops the lowest kept entries of each group and keeps as many others instead.

    Args:
        scores: Scores of entries that may stay, floats in the order of `numerics.ranking`.
        growth: Scores of entries that may grow, likewise.
        mask: Booleans of their shape, what was kept.
        allowed: Booleans that broadcast to it, false where nothing may be kept.
        count: Entries that each group exchanges; at most ``n``, fewer if fewer are free.
        n: Entries kept in each group, if it has them.
        m: Group size.
        axis: The axis of the groups, not negative.

    Returns:
        The new mask. What was dropped is not among what came.

    Example:
        >>> x, grads = jnp.array([4.0, 3.0, 0.0, 0.0]), jnp.array([0.0, 0.0, 1.0, 2.0])
        >>> n_m_exchange(x, grads, x > 0, jnp.array(True), 1, 2, 4, 0).tolist()
        [True, False, False, True]
    """
    allowed = jnp.broadcast_to(allowed, mask.shape)
    group = functools.partial(_grouped, m=m, axis=axis)
    old, free = group(mask & allowed, fill=False), group(allowed & ~mask, fill=False)
    counted = lambda x: jnp.sum(x, axis + 1, keepdims=True, dtype=jnp.int32)
    came = jnp.minimum(jnp.maximum(jnp.minimum(count, n), n - counted(old)), counted(free))

    def first(x, among, count):
        order = group(magnitude_patterns(x), fill=-1)
        return among & (_ranks(jnp.where(among, order, -1), axis) < count)

    return _joined(first(scores, old, n - came) | first(growth, free, came), mask.shape, axis)


@functools.partial(jax.jit, static_argnames=("n", "m"))
def transposable_mask(scores: jax.Array, n: int, m: int) -> jax.Array:
    """A mask that is n:m along both of the last axes, as a product and its transpose need it.

    In each block of ``m`` by ``m`` the largest scores are taken one after the other, as long as
    their row and their column have fewer than ``n``. The sum of what is kept is at least half of
    the largest one, and far nearer to it on weights.

    Args:
        scores: ``[*stack, k, n]``, floats in the order of `numerics.ranking`.
        n: The most entries that each row and each column of a block keeps.
        m: Length of blocks; those at the ends may be smaller.

    Returns:
        Booleans of the scores' shape. A row or a column may have fewer than ``n``, if all that is
        left of it meets full ones.

    Example:
        >>> transposable_mask(jnp.array([[4.0, 3.0], [2.0, 1.0]]), 1, 2).tolist()
        [[True, False], [False, True]]

    References:
        Hubara et al., 2021, Accelerated Sparse Neural Training: A Provable and Efficient Method to
        Find N:M Transposable Masks.
    """
    rank = scores.ndim
    rows = _grouped(magnitude_patterns(scores), m, rank - 2, -1)
    x = jnp.moveaxis(_grouped(rows, m, rank, -1), rank - 1, rank)
    flat = x.reshape(math.prod(x.shape[:-2]), m * m)
    at = jnp.arange(len(flat))

    def take(_, mask):
        wide = mask.reshape(len(flat), m, m)
        full = [jnp.sum(wide, d, keepdims=True) >= n for d in (1, 2)]
        closed = (wide | full[0] | full[1]).reshape(mask.shape)
        rest = jnp.where(closed, -1, flat)
        best = jnp.argmax(rest, 1)
        return mask.at[at, best].max(rest[at, best] >= 0)

    mask = lax.fori_loop(0, n * m, take, jnp.zeros(flat.shape, bool)).reshape(x.shape)
    k, length = scores.shape[-2:]
    whole = jnp.moveaxis(mask, rank, rank - 1)
    whole = whole.reshape(*scores.shape[:-2], -(-k // m) * m, -(-length // m) * m)
    return whole[..., :k, :length]
