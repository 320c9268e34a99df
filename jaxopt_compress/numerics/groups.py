"""Values per group of consecutive entries, and how they meet the entries."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

# (negative axis, entries per group)
Cuts = Sequence[tuple[int, int]]


def cuts_of(axis: int | None, group: int | None, tile: tuple[int, int] | None) -> Cuts:
    """The axes that are cut: ``axis`` by ``group``, and that of ``tile``; as far as given."""
    own = () if axis is None or group is None else ((axis, group),)
    return own if tile is None else (*own, tile)


def spread(per_group: jax.Array, axis: int, group: int) -> jax.Array:
    """Repeats each entry along ``axis`` ``group`` times: one value per entry again."""
    at = per_group.ndim + axis
    wide = jnp.expand_dims(per_group, at + 1)
    shape = (*wide.shape[: at + 1], group, *wide.shape[at + 2 :])
    merged = (*per_group.shape[:at], per_group.shape[at] * group, *per_group.shape[at + 1 :])
    return jnp.broadcast_to(wide, shape).reshape(merged)


def spread_to(per_group: jax.Array, cuts: Cuts, shape: Sequence[int]) -> jax.Array:
    """As `spread`, along several axes and cut to ``shape``; axes of size 1 stay."""
    for axis, group in cuts:
        if per_group.shape[axis] > 1:
            wide = spread(per_group, axis, group)
            per_group = jax.lax.slice_in_dim(wide, 0, shape[axis], axis=wide.ndim + axis)
    return per_group


def by_groups(
    fn: Callable[[jax.Array, tuple[int, ...]], tuple[jax.Array, ...]],
    x: jax.Array,
    reduce: Sequence[int],
    cuts: Cuts = (),
) -> tuple[jax.Array, ...]:
    """Reduces an array over some axes whole, and over others group by group.

    Args:
        fn: ``fn(x, axes) -> results``, which have size 1 along ``axes``.
        x: Any shape.
        reduce: Negative axes that are reduced.
        cuts: Axes, not in ``reduce``, that are cut into groups; a last one that is shorter is
            filled up with zeros.

    Returns:
        The results, of the rank of ``x``, with one entry per group.

    Example:
        >>> import jax.numpy as jnp
        >>> largest = lambda x, axes: (jnp.max(x, axes, keepdims=True),)
        >>> by_groups(largest, jnp.arange(6.0).reshape(2, 3), (-2,), [(-1, 2)])
        (Array([[4., 5.]], dtype=float32),)
    """
    x, axes, inner = grouped(x, reduce, cuts)
    results = fn(x, axes)
    return tuple(jnp.squeeze(y, inner) for y in results)


def grouped(
    x: jax.Array, reduce: Sequence[int], cuts: Cuts = ()
) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...]]:
    """An array with each axis that is cut as two, of groups and of their entries.

    Args:
        x: As in `by_groups`.
        reduce: As in `by_groups`.
        cuts: As in `by_groups`.

    Returns:
        The array, the axes along which what shares a result runs, and those of the entries of
        groups among them.
    """
    groups = dict(cuts)
    widths = [(0, -n % groups.get(d - x.ndim, 1)) for d, n in enumerate(x.shape)]
    if any(fill for _, fill in widths):
        x = jnp.pad(x, widths)
    shape, axes, inner = [], [], []
    for d, n in enumerate(x.shape):
        axes += [len(shape)] if d - x.ndim in reduce else []
        shape += [n]
        if d - x.ndim in groups:
            shape[-1:] = [n // groups[d - x.ndim], groups[d - x.ndim]]
            inner.append(len(shape) - 1)
    return x.reshape(shape), (*axes, *inner), tuple(inner)
