"""The k-th largest of integers, by counting how many reach a threshold."""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_EVEN = 8  # equal parts of the bracket: each pass finds at least 3 bits
_AROUND = (4, 7, 10, 13)  # distances from the interpolated place: the bracket's width >> these


def spread_stack(x: jax.Array, like: jax.Array) -> jax.Array:
    """Broadcasts one entry for each stack element against an array."""
    return jnp.expand_dims(x, tuple(range(x.ndim, like.ndim)))


def count_reaching(arrays: Sequence[jax.Array], thresholds: Sequence[jax.Array]) -> jax.Array:
    """Number of entries at or above each threshold, in one pass over the arrays."""

    def add(a, b):
        return tuple(map(operator.add, a, b))

    zeros = (jnp.int32(0),) * len(thresholds)
    totals = zeros
    for x in arrays:
        above = tuple((x >= spread_stack(t, x)).astype(jnp.int32) for t in thresholds)
        # One reduce with many operands is one loop; as many reduces would read the array as often.
        dims = tuple(range(thresholds[0].ndim, x.ndim))
        totals = add(totals, lax.reduce(above, zeros, add, dims))
    return jnp.stack(totals)


class Bracket(NamedTuple):
    """Integers ``low <= high`` with ``count(x >= low) >= keep >= count(x >= high)``."""

    low: jax.Array
    high: jax.Array
    at_low: jax.Array
    at_high: jax.Array


def search(integers, leaves, keep: jax.Array, size: int, top: int, dtype, likely=None) -> Bracket:
    """Narrows ``[0, top)`` until ``at_low == keep`` or ``high == low + 1``.

    ``integers(leaves, size)`` makes the arrays to search, inside each pass; ``likely`` are the
    thresholds of the first one.
    """
    # Nothing to keep is answered by the empty end, everything by the full one: no pass.
    bracket = Bracket(
        low=jnp.where(keep == 0, top, 0).astype(dtype),
        high=jnp.full_like(keep, top, dtype),
        at_low=jnp.where(keep == 0, 0, size).astype(jnp.int32),
        at_high=jnp.zeros_like(keep),
    )

    def unfinished(state):
        bracket, _ = state
        return jnp.any((bracket.high - bracket.low > 1) & (bracket.at_low != keep))

    def body(state):
        (low, high, at_low, at_high), first = state
        width = high - low
        thresholds = [low + i * ((width + _EVEN - 1) // _EVEN) for i in range(1, _EVEN)]
        share = (at_low - keep) / jnp.maximum(at_low - at_high, 1)
        place = low + (width.astype(jnp.float32) * share.astype(jnp.float32)).astype(dtype)
        thresholds += [place + sign * (width >> k) for k in _AROUND for sign in (-1, 1)]
        if likely is not None:
            pairs = zip(likely, thresholds, strict=True)
            thresholds = [jnp.where(first, a, b) for a, b in pairs]
        # Outside the bracket a threshold is moved to its end, where it agrees with the invariant.
        thresholds = [jnp.clip(t, low, high) for t in thresholds]
        # The integers are the same in each pass. Unless they seem to depend on it, XLA moves them
        # out of the loop, which stores an array of the leaf's size to be read instead of the leaf.
        inputs = (tuple(leaves), jnp.int32(size), thresholds)
        again, again_size, thresholds = lax.optimization_barrier(inputs)
        counts = count_reaching(integers(again, again_size), thresholds)
        thresholds = jnp.stack(thresholds)
        reached = counts >= keep
        bracket = Bracket(
            low=jnp.max(jnp.where(reached, thresholds, low), 0),
            high=jnp.min(jnp.where(reached, high, thresholds), 0),
            at_low=jnp.min(jnp.where(reached, counts, at_low), 0),
            at_high=jnp.max(jnp.where(reached, at_high, counts), 0),
        )
        return bracket, jnp.asarray(False)

    return lax.while_loop(unfinished, body, (bracket, jnp.asarray(True)))[0]
