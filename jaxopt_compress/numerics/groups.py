"""Values per group of consecutive entries, and how they meet the entries."""

import jax
import jax.numpy as jnp


def split_groups(x: jax.Array, axis: int, group: int) -> jax.Array:
    """Splits ``axis`` (negative) of length ``n * group`` into two, ``(n, group)``."""
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], x.shape[at] // group, group, *x.shape[at + 1 :])


def spread(per_group: jax.Array, axis: int, group: int) -> jax.Array:
    """Repeats each entry along ``axis`` ``group`` times: one value per entry again."""
    at = per_group.ndim + axis
    wide = jnp.expand_dims(per_group, at + 1)
    shape = (*wide.shape[: at + 1], group, *wide.shape[at + 2 :])
    merged = (*per_group.shape[:at], per_group.shape[at] * group, *per_group.shape[at + 1 :])
    return jnp.broadcast_to(wide, shape).reshape(merged)


def range_of(
    x: jax.Array,
    reduce: tuple[int, ...],
    axis: int | None,
    group: int | None,
    symmetric: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Minimum and maximum over the axes ``reduce``, by groups along ``axis`` if ``group`` is given.

    Args:
        x: Floats, any shape.
        reduce: Negative axes that share one range.
        axis: The negative axis that is cut into groups; not in ``reduce``.
        group: Entries per group; divides the length of ``axis``.
        symmetric: Whether the range is to be centred on 0, which takes one reduction less.

    Returns:
        ``(low, high)``: float32, the rank of ``x``, size 1 along ``reduce`` and ``length / group``
        along ``axis``. An empty range is ``(0, 0)``.
    """
    x = x.astype(jnp.float32)
    axes = tuple(reduce)
    if group is not None:
        assert axis is not None
        x = split_groups(x, axis, group)
        # Axes left of the cut moved one further from the end; its own entries are reduced too.
        axes = (*tuple(a - (a < axis) for a in axes), axis)
    if x.size == 0:
        low = high = jnp.zeros(
            [1 if i - x.ndim in axes else n for i, n in enumerate(x.shape)], jnp.float32
        )
    elif symmetric:
        high = jnp.max(jnp.abs(x), axes, keepdims=True)
        low = -high
    else:
        low, high = jnp.min(x, axes, keepdims=True), jnp.max(x, axes, keepdims=True)
    if group is not None:
        assert axis is not None
        low, high = jnp.squeeze(low, axis), jnp.squeeze(high, axis)
    return low, high
