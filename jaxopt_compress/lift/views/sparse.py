"""Views of sparse arrays: along a row or a group there are none, and the dense array is looked at.

Sparse weights are expanded where they are used, which does not count as a fallback.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxopt_compress.arrays import SparseArray
from jaxopt_compress.lift.views import base
from jaxopt_compress.lift.views.base import Cut, NoView, Regrouping
from jaxopt_compress.typing import Value


def _map_fields(array: SparseArray, fn: Callable[[Value], Value], **meta: Any) -> SparseArray:
    return array.replace(values=fn(array.values), words=fn(array.words), **meta)


def _row_start(array: SparseArray) -> int:
    return array.ndim - len(array.core)


def _front(array: SparseArray) -> int:
    return array.ndim + array.axis  # pyright: ignore


@base.transposed.register
def _transposed(array: SparseArray, order: Sequence[int]) -> Value:
    if array.pattern is None:
        return jnp.transpose(array.materialize(), order)
    axis = tuple(order).index(_front(array)) - array.ndim
    return _map_fields(array, lambda x: jnp.transpose(x, order), axis=axis)


@base.cut.register
def _cut(array: SparseArray, cuts: Mapping[int, Cut]) -> Value:
    bound = {_front(array)} if array.pattern else set(range(_row_start(array), array.ndim))
    if bound & set(cuts):
        return base.cut(array.materialize(), cuts)
    return _map_fields(array, lambda x: base.cut(x, cuts))


@base.reshaped.register
def _reshaped(array: SparseArray, new: tuple[int, ...]) -> Value:
    """Rows are kept in row-major order, which a reshape leaves alone."""
    try:
        return _reshaped_groups(array, new) if array.pattern else _reshaped_rows(array, new)
    except NoView:
        return array.materialize().reshape(new)


def _reshaped_rows(array: SparseArray, new: tuple[int, ...]) -> SparseArray:
    stack = math.prod(array.shape[: _row_start(array)])
    fits = (i for i in range(len(new)) if math.prod(new[:i]) == stack)
    start = next(fits, None)
    if start is None or 0 in new:
        raise NoView
    ones = (1,) * (len(new) - start - 1)
    return _map_fields(
        array, lambda x: x.reshape(*new[:start], *ones, x.shape[-1]), core=tuple(new[start:])
    )


def _reshaped_groups(array: SparseArray, new: tuple[int, ...]) -> SparseArray:
    n_m, front = array.pattern, _front(array)
    how = Regrouping.of(array.shape, new, front)
    if n_m is None or how.place is None or array.length not in (None, new[how.place]):
        raise NoView
    if array.length is None and new[how.place] % math.lcm(8, n_m[1]):
        raise NoView
    axis = how.place - len(new)
    return _map_fields(array, lambda x: x.reshape(how.shape(x.shape, True)), axis=axis)


@base.flipped.register
def _flipped(array: SparseArray, axes: Sequence[int]) -> Value:
    return lax.rev(array.materialize(), axes)


@base.scaled.register
def _scaled(array: SparseArray, factor: Value) -> SparseArray:
    return array.replace(values=base.scaled(array.values, factor))


@base.cast.register
def _cast(array: SparseArray, dtype: DTypeLike) -> SparseArray:
    return array.replace(values=array.values.astype(dtype))


@base.stacked.register
def _stacked(array: SparseArray, length: int) -> SparseArray:
    bound = _front(array) if array.pattern else _row_start(array)
    if bound == 0:
        raise NoView
    return _map_fields(array, lambda x: base.stacked(x, length))
