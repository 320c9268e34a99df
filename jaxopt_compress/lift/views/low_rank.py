"""Views of low-rank arrays: an operation on an axis applies to the factor that has it."""

import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxopt_compress.arrays import LowRankArray
from jaxopt_compress.lift.views import base
from jaxopt_compress.lift.views.base import Cut, NoView
from jaxopt_compress.typing import Value


def left_end(w: LowRankArray) -> int:
    """Where the left axes end and the right ones begin."""
    return w.ndim - w.out_ndim


def stack_end(w: LowRankArray) -> int:
    """Where the axes end that both factors have."""
    shared = [d for d in range(left_end(w) - 1) if w.v.shape[d] > 1]
    return max(shared, default=-1) + 1


def _both(w: LowRankArray, u: Value, v: Value, out_ndim: int | None = None) -> LowRankArray:
    return w.replace(u=u, v=v, out_ndim=w.out_ndim if out_ndim is None else out_ndim)


@base.transposed.register
def _transposed(w: LowRankArray, order: Sequence[int]) -> LowRankArray:
    """Permutes axes within each side, and swaps the sides."""
    stack, middle, ndim = stack_end(w), left_end(w), w.ndim
    left, right = list(range(stack, middle)), list(range(middle, ndim))
    lead, rest = list(order[:stack]), list(order[stack:])
    if sorted(lead) != list(range(stack)):
        raise NoView
    if sorted(rest[: len(left)]) == left:
        u = base.transposed(w.u, [*lead, *rest[: len(left)], *right])
        return _both(w, u, base.transposed(w.v, [*lead, *left, *rest[len(left) :]]))
    if sorted(rest[: len(right)]) != right:
        raise NoView
    # v is [stack, ones, rank, right]: its right axes go first, its rank last.
    u = base.transposed(w.v, [*lead, *rest[: len(right)], *left])
    v = base.transposed(w.u, [*lead, *right, *rest[len(right) :]])
    return _both(w, u, v, len(left))


def _per_factor(w: LowRankArray, axes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Which of ``axes`` the first factor has, and which the second."""
    stack, middle = stack_end(w), left_end(w)
    return [d for d in axes if d < middle], [d for d in axes if d < stack or d >= middle]


@base.cut.register
def _cut(w: LowRankArray, cuts: Mapping[int, Cut]) -> LowRankArray:
    first, second = _per_factor(w, list(cuts))
    pick = lambda axes: {d: cuts[d] for d in axes}
    return _both(w, base.cut(w.u, pick(first)), base.cut(w.v, pick(second)))


@base.flipped.register
def _flipped(w: LowRankArray, axes: Sequence[int]) -> LowRankArray:
    first, second = _per_factor(w, axes)
    return _both(w, base.flipped(w.u, first), base.flipped(w.v, second))


@base.reshaped.register
def _reshaped(w: LowRankArray, new: tuple[int, ...]) -> LowRankArray:
    """Merges and splits axes of one side, and of the stack."""
    stack, middle = stack_end(w), left_end(w)
    counts = math.prod(w.shape[:stack]), math.prod(w.shape[:middle])
    reach = lambda n, low: next((i for i in range(low, len(new)) if math.prod(new[:i]) == n), None)
    lead = reach(counts[0], 0)
    cut = None if lead is None else reach(counts[1], lead + 1)
    if 0 in new or lead is None or cut is None:
        raise NoView
    left, right = new[lead:cut], new[cut:]
    u = base.reshaped(w.u, (*new[:lead], *left, *(1,) * (len(right) - 1), w.rank))
    v = base.reshaped(w.v, (*new[:lead], *(1,) * (len(left) - 1), w.rank, *right))
    return _both(w, u, v, len(right))


@base.scaled.register
def _scaled(w: LowRankArray, factor: Value) -> LowRankArray:
    return w.replace(v=base.scaled(w.v, factor))


@base.cast.register
def _cast(w: LowRankArray, dtype: DTypeLike) -> LowRankArray:
    return w.replace(dtype=jnp.dtype(dtype))


@base.stacked.register
def _stacked(w: LowRankArray, length: int) -> LowRankArray:
    """Copies the second factor, where the leading axis belongs to the first alone."""
    if left_end(w) < 2:
        raise NoView
    return _both(w, base.stacked(w.u, length), base.stacked(w.v, length))
