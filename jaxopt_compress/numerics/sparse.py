"""Dense arrays from kept values and a mask, and back."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# The distances between kept entries take the smallest of these that holds them all.
GAP_DTYPES = tuple(map(np.dtype, (np.uint8, np.uint16, np.uint32)))


def expand(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Puts ``values[i]`` where ``mask`` is true for the ``i``-th time; zeros elsewhere.

    Args:
        values: The kept entries in row-major order of the mask, ``[*stack, capacity]``.
        mask: Booleans, ``[*stack, size]``.

    Returns:
        Entries of the dtype of ``values``, ``[*stack, size]``.

    Example:
        >>> import jax.numpy as jnp
        >>> expand(jnp.array([7, 8]), jnp.array([False, True, False, True]))
        Array([0, 7, 0, 8], dtype=int32)
    """
    zero = jnp.zeros((), values.dtype)
    if (split := jax.typeof(mask).sharding).spec[-1] is not None:
        # Entries are counted along the whole axis, which an explicit mesh axis has to be told.
        whole = PartitionSpec(*split.spec[:-1], None)
        mask = jax.sharding.reshard(mask, NamedSharding(split.mesh, whole))
    if values.shape[-1] == 0:
        # Made from the mask, so that it is on the mask's devices.
        return jnp.where(mask, zero, zero)
    rank = jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)
    spread = jnp.take_along_axis(values, rank, axis=-1, mode="clip")
    return jnp.where(mask, spread, zero)


def gather_kept(dense: jax.Array, mask: jax.Array, capacity: int) -> jax.Array:
    """Inverts `expand`: the entries under the mask in row-major order, filled up with zeros.

    Args:
        dense: ``[*stack, size]``.
        mask: Booleans, ``[*stack, size]``, at most ``capacity`` of them true per row.
        capacity: The length of the result's last axis.

    Returns:
        ``[*stack, capacity]``.
    """
    order = jnp.argsort(~mask, axis=-1, stable=True)[..., :capacity]
    kept = jnp.take_along_axis(dense, order, axis=-1)
    valid = jnp.take_along_axis(mask, order, axis=-1)
    return jnp.where(valid, kept, jnp.zeros((), dense.dtype))


def gaps_of(mask: np.ndarray, capacity: int) -> np.ndarray:
    """How many entries are left out before each kept one.

    Args:
        mask: Booleans, ``[*stack, size]``, at most ``capacity`` of them true per row.
        capacity: The length of the result's last axis. Shorter rows are filled up with positions
            beyond their end.

    Returns:
        Int64, ``[*stack, capacity]``.

    Example:
        >>> gaps_of(np.array([False, True, True, False, False, True]), 4)
        array([1, 0, 2, 0])
    """
    size = mask.shape[-1]
    at = np.arange(size, size + capacity, dtype=np.int64)
    at = np.broadcast_to(at, (*mask.shape[:-1], capacity)).copy()
    rows = at.reshape(math.prod(mask.shape[:-1]), capacity)
    for row, kept in zip(rows, mask.reshape(-1, size), strict=True):
        found = np.flatnonzero(kept)
        row[: len(found)] = found
        row[len(found) :] = np.arange(size, size + capacity - len(found))
    return np.diff(at, axis=-1, prepend=-1) - 1


def mask_of_gaps(gaps: jax.Array, size: int) -> jax.Array:
    """Inverts `gaps_of`.

    Args:
        gaps: Unsigned integers, ``[*stack, capacity]``.
        size: The length of a row.

    Returns:
        Booleans, ``[*stack, size]``.
    """

    def placed(gaps: jax.Array) -> jax.Array:
        at = jnp.cumsum(gaps.astype(jnp.int32) + 1, axis=-1) - 1
        empty = jnp.zeros((*gaps.shape[:-1], size), bool)
        return jnp.put_along_axis(empty, at, True, axis=-1, inplace=False, mode="drop")

    split = jax.typeof(gaps).sharding
    if AxisType.Explicit not in split.mesh.axis_types:
        return placed(gaps)
    whole = NamedSharding(split.mesh, PartitionSpec(*split.spec[:-1], None))
    return jax.sharding.auto_axes(placed, out_sharding=whole)(gaps)  # pyright: ignore


def expand_nm(values: jax.Array, mask: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """As `expand`, where each ``m`` consecutive entries along ``axis`` own ``n`` values.

    Args:
        values: Shape of the mask, but ``length / m * n`` along ``axis``.
        mask: Booleans whose length along ``axis`` is a multiple of ``m``.
        n: Values per group.
        m: Entries per group.
        axis: A negative axis.

    Returns:
        Entries of the shape of ``mask``.
    """
    at = mask.ndim + axis

    def cut(x, k):
        return x.reshape(*x.shape[:at], x.shape[at] // k, k, *x.shape[at + 1 :])

    grouped, kept = cut(mask, m), cut(values, n)
    rank = jnp.cumsum(grouped, axis=at + 1, dtype=jnp.int32) - 1
    dense = jnp.zeros((), values.dtype)
    for j in range(n):
        # n selects instead of a gather: n is small, and selects fuse.
        value = jax.lax.index_in_dim(kept, j, at + 1)
        dense = jnp.where(grouped & (rank == j), value, dense)
    return dense.reshape(mask.shape)


def gather_kept_nm(dense: jax.Array, mask: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """Inverts `expand_nm`; groups with fewer than ``n`` kept entries are filled up with zeros."""
    at = mask.ndim + axis

    def cut(x):
        return x.reshape(*x.shape[:at], x.shape[at] // m, m, *x.shape[at + 1 :])

    groups, grouped = cut(dense), cut(mask)
    rank = jnp.cumsum(grouped, axis=at + 1, dtype=jnp.int32) - 1

    def entry(x, i):
        return jax.lax.index_in_dim(x, i, at + 1)

    kept = []
    for j in range(n):
        # Selects, not a sum of products: a kept -0.0 stays one.
        value = jnp.zeros_like(entry(groups, 0))
        for i in range(m):
            value = jnp.where(entry(grouped, i) & (entry(rank, i) == j), entry(groups, i), value)
        kept.append(value)
    shape = (*mask.shape[:at], mask.shape[at] // m * n, *mask.shape[at + 1 :])
    return jnp.concatenate(kept, at + 1).reshape(shape)


def flatten_core(x: jax.Array, core: tuple[int, ...]) -> jax.Array:
    """``[*stack, *core]`` to ``[*stack, prod(core)]``."""
    return x.reshape(*x.shape[: x.ndim - len(core)], math.prod(core))


def fill_up(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Appends zeros until the length of ``axis`` is a multiple of ``multiple``."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths)


def smaller_gaps(kept: jax.Array, capacity: int) -> np.ndarray | None:
    """The distances between kept entries, if they take fewer bytes than one bit for each entry."""
    rows, size = kept.shape[:-1], kept.shape[-1]
    bits = -(-size // 8)
    if capacity >= bits or len(kept.sharding.device_set) > 1:
        return None
    found = gaps_of(np.asarray(kept), capacity)
    top = int(found.max(initial=0))
    dtype = next(d for d in GAP_DTYPES if top <= np.iinfo(d).max)
    smaller = math.prod(rows) * capacity * dtype.itemsize < math.prod(rows) * bits
    return found.astype(dtype) if smaller else None
