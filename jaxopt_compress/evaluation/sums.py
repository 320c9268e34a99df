"""Weighted sums over examples, and quotients of sums."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def spread(weights: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Weights of examples, for each entry of an array whose leading axes are the examples'.

    Raises:
        ValueError: They are not.
    """
    if tuple(weights.shape) != shape[: weights.ndim]:
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} for values of shape {shape}: they need one "
            "for each example, along the leading axes"
        )
    ones = (1,) * (len(shape) - weights.ndim)
    return jnp.broadcast_to(weights.reshape(*weights.shape, *ones), shape)


def weighted_sum(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The sum; counts stay integers without weights, so that they are exact."""
    if weights is None:
        whole = jnp.issubdtype(values.dtype, jnp.integer) or values.dtype == bool
        return jnp.sum(values, dtype=jnp.int32 if whole else jnp.float32)
    spread_weights = spread(weights, values.shape).astype(jnp.float32)
    # An example that does not count may hold anything, NaN too.
    return jnp.sum(jnp.where(spread_weights == 0, 0, values * spread_weights))


def count(shape: tuple[int, ...], weights: jax.Array | None) -> jax.Array:
    """The number of entries that count, or the sum of their weights."""
    return weighted_sum(jnp.ones(shape, jnp.int32), weights)


def quotient(sums: Any) -> float:
    """The first over the second, NaN for 0 / 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(sums[0]) / np.float64(sums[1]))


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a / b``, and 0 where ``b`` is 0."""
    return np.divide(a, b, out=np.zeros(np.shape(a)), where=b != 0)
