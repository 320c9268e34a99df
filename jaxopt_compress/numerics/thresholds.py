"""Masks of the largest entries, by counting instead of sorting.

The k-th largest score is found as a bit pattern: for floats without a sign, the order of the
patterns read as integers is the order of the values. One pass over the scores counts the entries
at or above 15 thresholds inside an interval of patterns that brackets the answer: 7 spread evenly,
which bound the number of passes, and 8 around the place where the counts at both ends say that the
answer should be. A pass reads each score once, writes nothing, and under a sharding communicates
15 integers. Ties at the boundary are split by the same search over positions.

Scores are ordered as `numerics.ranking` says; among equal ones the lower row-major index is kept
first.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jaxopt_compress.numerics.counting import search, spread_stack
from jaxopt_compress.numerics.ranking import (
    check_scores,
    integer_type,
    magnitude_patterns,
    top_pattern,
    value_of,
)
from jaxopt_compress.numerics.rounding import promoted

_OCTAVES = range(-13, 2)  # without a hint, first thresholds are these powers of two
# In float32 from a few of the smallest steps to a factor of 8 and more, either way.
_HINT_DISTANCES = (*(-(12**i) for i in range(7, 0, -1)), 0, *(12**i for i in range(1, 8)))


class Largest(NamedTuple):
    """The largest entries of an array.

    Attributes:
        mask: Bool array of the scores' shape; True for the entries kept.
        threshold: Score that separates them, of shape ``scores.shape[:stack_ndim]``: every score
            above it is kept, every score below it is not. A good ``hint`` for the next call.
    """

    mask: jax.Array
    threshold: jax.Array


def _octaves(dtype) -> list[int]:
    """The patterns of ``2**e`` for the usual magnitudes of weights."""
    info = jnp.finfo(dtype)
    return [(e + 2 ** (info.nexp - 1) - 1) << info.nmant for e in _OCTAVES]


def _per_stack(x: ArrayLike, scores: jax.Array, stack_ndim: int) -> jax.Array:
    """One entry for each stack element, sharded as the stack is."""
    x = jnp.broadcast_to(x, scores.shape[:stack_ndim])
    sharding = jax.typeof(scores).sharding
    spec = sharding.spec[:stack_ndim]
    if all(axis is None for axis in spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def _positions(arrays: Sequence[jax.Array], size: ArrayLike, stack_ndim: int) -> list[jax.Array]:
    """``size, size - 1, ..., 1`` in concatenated row-major order, in the arrays' shapes."""
    out = []
    for x in arrays:
        # Starting from the array itself gives the positions its sharding.
        position = jnp.zeros_like(x, jnp.int32) + size
        stride = _size(x, stack_ndim)
        size = size - stride
        for axis in range(stack_ndim, x.ndim):
            stride //= max(x.shape[axis], 1)
            along = [length if d == axis else 1 for d, length in enumerate(x.shape)]
            position = position - stride * lax.broadcasted_iota(jnp.int32, along, axis)
        out.append(position)
    return out


def _size(x: jax.Array, stack_ndim: int) -> int:
    return math.prod(x.shape[stack_ndim:])


@functools.partial(jax.jit, static_argnames="stack_ndim")
def _largest(leaves, keep, hint, stack_ndim=0) -> tuple[list[jax.Array], jax.Array]:
    """Masks and threshold of the ``keep`` largest entries of all leaves (of one dtype) together."""
    dtype = leaves[0].dtype
    top = top_pattern(dtype)
    size = sum(_size(x, stack_ndim) for x in leaves)
    keep = _per_stack(jnp.clip(keep, 0, size), leaves[0], stack_ndim)
    # What the loops carry differs between devices where scores do, inside of `jax.shard_map`.
    for x in leaves:
        keep += jnp.zeros_like(jnp.sum(x, tuple(range(stack_ndim, x.ndim))), keep.dtype)
    integer = promoted(integer_type(dtype), jnp.int32)
    if hint is None:
        likely = [jnp.full_like(keep, pattern, integer) for pattern in _octaves(dtype)]
    else:
        hint = _per_stack(magnitude_patterns(hint), leaves[0], stack_ndim)
        likely = [hint + distance for distance in _HINT_DISTANCES]

    def patterns(leaves, _):
        return [magnitude_patterns(x) for x in leaves]

    found = search(patterns, leaves, keep, size, top, integer, likely)

    # Unless the threshold separates exactly, its ties are kept from the highest position down.
    # Positions are distinct, so this second search always ends on the exact count.
    needed = jnp.where(found.at_low == keep, size, keep - found.at_high)

    def tied_positions(leaves, size):
        pairs = zip(leaves, _positions(leaves, size, stack_ndim), strict=True)
        return [
            jnp.where(magnitude_patterns(x) == spread_stack(found.low, x), at, 0) for x, at in pairs
        ]

    cut = search(tied_positions, leaves, needed, size, size + 1, jnp.int32).low
    masks = []
    for x, position in zip(leaves, _positions(leaves, size, stack_ndim), strict=True):
        pattern, low = magnitude_patterns(x), spread_stack(found.low, x)
        masks.append((pattern > low) | ((pattern == low) & (position >= spread_stack(cut, x))))
    return masks, value_of(jnp.minimum(found.low, top - 2), dtype)


def _check_keep(keep: ArrayLike, size: int) -> None:
    if isinstance(keep, (int, np.integer)) and not 0 <= keep <= size:
        raise ValueError(f"keep={keep} of {size} entries; keep must lie in 0..{size}")


def largest(
    scores: ArrayLike,
    keep: ArrayLike,
    *,
    stack_ndim: int = 0,
    hint: ArrayLike | None = None,
) -> Largest:
    """Finds the ``keep`` largest entries and the threshold that separates them.

    Exactly ``keep`` entries, always; `numerics.ranking` states the order. Works under ``jit``,
    ``vmap`` and any sharding (a sharded stack in Explicit mode needs ``stack_ndim`` rather than
    ``vmap``). Each pass reads the scores once. Float32 takes at most 12 passes, 16-bit floats at
    most 6, and splitting ties at most ``log8(size) + 1`` more; smooth distributions take fewer.

    Args:
        scores: Floats of shape ``stack + shape``.
        keep: Number of entries to keep in each stack element: an int, or int32 of shape ``()`` or
            ``stack``, which may be traced. A traced value is clipped to the possible ones.
        stack_ndim: Number of leading axes that hold separate tensors.
        hint: The likely threshold, of shape ``()`` or ``stack``, for example that of the previous
            call. It changes the number of passes and never the mask.

    Returns:
        The mask and the threshold.

    Raises:
        ValueError: ``keep``, ``stack_ndim`` or the size is out of range.
        TypeError: The scores are not floats of at least 16 bits.

    Example:
        >>> mask, threshold = largest(jnp.array([3.0, 1.0, 3.0, 3.0]), 2)
        >>> mask.tolist(), threshold.item()
        ([True, False, True, False], 3.0)
    """
    scores = jnp.asarray(scores)
    if not 0 <= stack_ndim <= scores.ndim:
        raise ValueError(
            f"stack_ndim={stack_ndim} for scores of shape {scores.shape}; "
            f"it must lie in 0..{scores.ndim}"
        )
    size = math.prod(scores.shape[stack_ndim:])
    check_scores(scores, size)
    _check_keep(keep, size)
    hint = None if hint is None else jnp.asarray(hint, scores.dtype)
    (mask,), threshold = _largest([scores], jnp.asarray(keep, jnp.int32), hint, stack_ndim)
    return Largest(mask, threshold)


def largest_mask(
    scores: ArrayLike,
    keep: ArrayLike,
    *,
    stack_ndim: int = 0,
    hint: ArrayLike | None = None,
) -> jax.Array:
    """Mask of exactly ``keep`` largest entries; :func:`largest` without the threshold.

    Args:
        scores: Floats of shape ``stack + shape``.
        keep: Number of entries to keep in each stack element, of shape ``()`` or ``stack``.
        stack_ndim: Number of leading axes that hold separate tensors.
        hint: The likely threshold, of shape ``()`` or ``stack``; it never changes the mask.

    Returns:
        Bool array of the scores' shape.

    Example:
        >>> largest_mask(jnp.array([[3.0, 1.0], [0.5, 2.0]]), 1, stack_ndim=1).tolist()
        [[True, False], [False, True]]
    """
    return largest(scores, keep, stack_ndim=stack_ndim, hint=hint).mask


def largest_masks(
    leaves: Sequence[ArrayLike],
    keep: ArrayLike,
    *,
    stack_ndim: int = 0,
    hint: ArrayLike | None = None,
) -> tuple[list[jax.Array], jax.Array]:
    """Masks of the ``keep`` largest entries of several arrays ranked together.

    Args:
        leaves: At least one float array; different dtypes are widened to their common one, exactly.
            Equal scores are kept in the order of the list, then by row-major index.
        keep: Number of entries to keep in total, an int or a traced int32, of shape ``()`` or that
            of the stack.
        stack_ndim: Number of leading axes, of the same lengths in all leaves, whose entries are
            ranked apart from each other.
        hint: The likely threshold; it never changes the masks.

    Returns:
        One bool array per leaf, of its shape; and the threshold, of the shape of the stack.

    Example:
        >>> masks, _ = largest_masks([jnp.array([1.0, 4.0]), jnp.array([4.0, 5.0])], 2)
        >>> [m.tolist() for m in masks]
        [[False, True], [False, True]]
    """
    arrays = [jnp.asarray(x) for x in leaves]
    size = sum(_size(x, stack_ndim) for x in arrays)
    _check_keep(keep, size)
    stacks = {x.shape[:stack_ndim] for x in arrays}
    if len(stacks) != 1:
        raise ValueError(f"stacks of the shapes {sorted(stacks)} cannot be ranked together")
    for x in arrays:
        check_scores(x, size)
    dtype = promoted(*(x.dtype for x in arrays))
    hint = None if hint is None else jnp.asarray(hint, dtype)
    arrays = [x.astype(dtype) for x in arrays]
    return _largest(arrays, jnp.asarray(keep, jnp.int32), hint, stack_ndim)
