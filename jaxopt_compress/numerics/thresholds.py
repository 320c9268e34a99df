"""Masks of the largest entries, by counting instead of sorting.

The k-th largest score is found as a bit pattern: for floats without a sign, the order of the
patterns read as integers is the order of the values. One pass over the scores counts the entries
at or above 15 thresholds inside an interval of patterns that brackets the answer: 7 spread evenly,
which bound the number of passes, and 8 around the place where the counts at both ends say that the
answer should be. A pass reads each score once, writes nothing, and under a sharding communicates
15 integers. Ties at the boundary are split by the same search over positions.

The order of scores, everywhere in this module:

- The sign is ignored: the order is that of ``abs(scores)``, ``-0 == +0``, and weights may be
  passed as they are. Subnormal numbers are told apart.
- NaN cannot be refused inside a compiled function. All NaNs are equal and larger than infinity, so
  they are kept: a diverged tensor stays visible, and the counts stay exact.
- Among equal scores the lower row-major index is kept first.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

_EVEN = 8  # equal parts of the bracket: each pass finds at least 3 bits
_AROUND = (4, 7, 10, 13)  # distances from the interpolated place: the bracket's width >> these
_MAX_SIZE = 2**31 - 32  # positions and thresholds are int32
_OCTAVES = range(-13, 2)  # without a hint, first thresholds are these powers of two
_HINT_DISTANCES = (*(-(8**i) for i in range(7, 0, -1)), 0, *(8**i for i in range(1, 8)))


class Largest(NamedTuple):
    """The largest entries of an array.

    Attributes:
        mask: Bool array of the scores' shape; True for the entries kept.
        threshold: Score that separates them, of shape ``scores.shape[:stack_ndim]``: every score
            above it is kept, every score below it is not. A good ``hint`` for the next call.
    """

    mask: jax.Array
    threshold: jax.Array


def _integer_type(dtype) -> jnp.dtype:
    return jnp.dtype(f"int{8 * jnp.dtype(dtype).itemsize}")


def _top(dtype) -> int:
    """One more than the pattern that stands for all NaNs, which is one more than infinity's."""
    info = jnp.finfo(dtype)
    return (((1 << info.nexp) - 1) << info.nmant) + 2


def _octaves(dtype) -> list[int]:
    """The patterns of ``2**e`` for the usual magnitudes of weights."""
    info = jnp.finfo(dtype)
    return [(e + 2 ** (info.nexp - 1) - 1) << info.nmant for e in _OCTAVES]


def _patterns(scores: jax.Array) -> jax.Array:
    """Integers in the order of ``abs(scores)``, at least 32 bits wide."""
    integer = _integer_type(scores.dtype)
    bits = lax.bitcast_convert_type(scores, integer) & jnp.iinfo(integer).max
    bits = jnp.minimum(bits, jnp.asarray(_top(scores.dtype) - 1, integer))
    return bits if bits.dtype.itemsize >= 4 else bits.astype(jnp.int32)


def _value(pattern: jax.Array, dtype) -> jax.Array:
    return lax.bitcast_convert_type(pattern.astype(_integer_type(dtype)), dtype)


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


def _spread(x: jax.Array, like: jax.Array) -> jax.Array:
    """Broadcasts one entry for each stack element against an array."""
    return jnp.expand_dims(x, tuple(range(x.ndim, like.ndim)))


def _count(arrays: Sequence[jax.Array], thresholds: Sequence[jax.Array]) -> jax.Array:
    """Number of entries at or above each threshold, in one pass over the arrays."""

    def add(a, b):
        return tuple(map(operator.add, a, b))

    zeros = (jnp.int32(0),) * len(thresholds)
    totals = zeros
    for x in arrays:
        above = tuple((x >= _spread(t, x)).astype(jnp.int32) for t in thresholds)
        # One reduce with many operands is one loop; as many reduces would read the array as often.
        dims = tuple(range(thresholds[0].ndim, x.ndim))
        totals = add(totals, lax.reduce(above, zeros, add, dims))
    return jnp.stack(totals)


class _Bracket(NamedTuple):
    """Integers ``low <= high`` with ``count(x >= low) >= keep >= count(x >= high)``."""

    low: jax.Array
    high: jax.Array
    at_low: jax.Array
    at_high: jax.Array


def _search(integers, leaves, keep: jax.Array, size: int, top: int, dtype, likely=None) -> _Bracket:
    """Narrows ``[0, top)`` until ``at_low == keep`` or ``high == low + 1``.

    ``integers(leaves, size)`` makes the arrays to search, inside each pass; ``likely`` are the
    thresholds of the first one.
    """
    # Nothing to keep is answered by the empty end, everything by the full one: no pass.
    bracket = _Bracket(
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
        counts = _count(integers(again, again_size), thresholds)
        thresholds = jnp.stack(thresholds)
        reached = counts >= keep
        bracket = _Bracket(
            low=jnp.max(jnp.where(reached, thresholds, low), 0),
            high=jnp.min(jnp.where(reached, high, thresholds), 0),
            at_low=jnp.min(jnp.where(reached, counts, at_low), 0),
            at_high=jnp.max(jnp.where(reached, at_high, counts), 0),
        )
        return bracket, jnp.asarray(False)

    return lax.while_loop(unfinished, body, (bracket, jnp.asarray(True)))[0]


@functools.partial(jax.jit, static_argnames="stack_ndim")
def _largest(leaves, keep, hint, stack_ndim=0) -> tuple[list[jax.Array], jax.Array]:
    """Masks and threshold of the ``keep`` largest entries of all leaves (of one dtype) together."""
    dtype = leaves[0].dtype
    top = _top(dtype)
    size = sum(_size(x, stack_ndim) for x in leaves)
    keep = _per_stack(jnp.clip(keep, 0, size), leaves[0], stack_ndim)
    integer = jnp.promote_types(_integer_type(dtype), jnp.int32)
    if hint is None:
        likely = [jnp.full_like(keep, pattern, integer) for pattern in _octaves(dtype)]
    else:
        hint = _per_stack(_patterns(hint), leaves[0], stack_ndim)
        likely = [hint + distance for distance in _HINT_DISTANCES]

    def patterns(leaves, _):
        return [_patterns(x) for x in leaves]

    found = _search(patterns, leaves, keep, size, top, integer, likely)

    # Unless the threshold separates exactly, its ties are kept from the highest position down.
    # Positions are distinct, so this second search always ends on the exact count.
    needed = jnp.where(found.at_low == keep, size, keep - found.at_high)

    def tied_positions(leaves, size):
        pairs = zip(leaves, _positions(leaves, size, stack_ndim), strict=True)
        return [jnp.where(_patterns(x) == _spread(found.low, x), at, 0) for x, at in pairs]

    cut = _search(tied_positions, leaves, needed, size, size + 1, jnp.int32).low
    masks = []
    for x, position in zip(leaves, _positions(leaves, size, stack_ndim), strict=True):
        pattern, low = _patterns(x), _spread(found.low, x)
        masks.append((pattern > low) | ((pattern == low) & (position >= _spread(cut, x))))
    return masks, _value(jnp.minimum(found.low, top - 2), dtype)


def _check_keep(keep: ArrayLike, size: int) -> None:
    if isinstance(keep, (int, np.integer)) and not 0 <= keep <= size:
        raise ValueError(f"keep={keep} of {size} entries; keep must lie in 0..{size}")


def _check_scores(scores: jax.Array, size: int) -> None:
    if not jnp.issubdtype(scores.dtype, jnp.floating) or scores.dtype.itemsize < 2:
        raise TypeError(
            f"scores of shape {scores.shape} have dtype {scores.dtype}; float16, bfloat16, "
            "float32 and float64 can be ranked"
        )
    if size > _MAX_SIZE:
        raise ValueError(
            f"{size} entries are ranked together, at most {_MAX_SIZE} can be; "
            "treat leading axes as a stack, or rank each leaf alone"
        )


def largest(
    scores: ArrayLike,
    keep: ArrayLike,
    *,
    stack_ndim: int = 0,
    hint: ArrayLike | None = None,
) -> Largest:
    """Finds the ``keep`` largest entries and the threshold that separates them.

    Exactly ``keep`` entries, always; the module's docstring states the order. Works under ``jit``,
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
    _check_scores(scores, size)
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
    leaves: Sequence[ArrayLike], keep: ArrayLike, *, hint: ArrayLike | None = None
) -> list[jax.Array]:
    """Masks of the ``keep`` largest entries of several arrays ranked together.

    Args:
        leaves: Float arrays; different dtypes are widened to their common one, exactly. Equal
            scores are kept in the order of the list, then by row-major index.
        keep: Number of entries to keep in total, an int or a traced int32 scalar.
        hint: The likely threshold, a scalar; it never changes the masks.

    Returns:
        One bool array per leaf, of its shape.

    Example:
        >>> [m.tolist() for m in largest_masks([jnp.array([1.0, 4.0]), jnp.array([4.0, 5.0])], 2)]
        [[False, True], [False, True]]
    """
    arrays = [jnp.asarray(x) for x in leaves]
    size = sum(x.size for x in arrays)
    _check_keep(keep, size)
    if not arrays:
        return []
    for x in arrays:
        _check_scores(x, size)
    dtype = functools.reduce(jnp.promote_types, [x.dtype for x in arrays])
    hint = None if hint is None else jnp.asarray(hint, dtype)
    return _largest([x.astype(dtype) for x in arrays], jnp.asarray(keep, jnp.int32), hint)[0]


@functools.partial(jax.jit, static_argnames=("n", "m", "axis"))
def _n_m(scores, n, m, axis):
    before, length, after = scores.shape[:axis], scores.shape[axis], scores.shape[axis + 1 :]
    pad = -length % m
    x = _patterns(scores)
    if pad:
        # Padding ranks below every score, so a ragged group keeps min(n, its length).
        x = lax.pad(x, jnp.asarray(-1, x.dtype), [(0, pad * (d == axis), 0) for d in range(x.ndim)])
    x = x.reshape(*before, (length + pad) // m, m, *after)
    entry, other = jnp.expand_dims(x, axis + 2), jnp.expand_dims(x, axis + 1)
    index = jnp.arange(m)
    earlier = (index[None, :] < index[:, None]).reshape(m, m, *(1 for _ in after))
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
        scores: Floats, in the order stated by the module's docstring.
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
    _check_scores(scores, 0)
    if not 1 <= n <= m:
        raise ValueError(f"pattern {n}:{m}; n must lie in 1..m, for example 2:4")
    if not -scores.ndim <= axis < scores.ndim:
        raise ValueError(
            f"axis={axis} for scores of shape {scores.shape}; "
            f"it must lie in {-scores.ndim}..{scores.ndim - 1}"
        )
    return _n_m(scores, n, m, axis % scores.ndim)
