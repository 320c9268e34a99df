"""Views of rotated arrays: views of the array and of the signs, the rotated axes left whole."""

from collections.abc import Callable, Mapping, Sequence

import jax
from jax.typing import DTypeLike

from jaxopt_compress.arrays import RotatedArray
from jaxopt_compress.lift.views import base
from jaxopt_compress.lift.views.base import Cut, NoView, matching_runs
from jaxopt_compress.typing import PyTree, Value


def _both(w: RotatedArray, fn: Callable[[PyTree], PyTree]) -> RotatedArray:
    return w.replace(array=fn(w.array), signs=fn(w.signs))


def _axes(w: RotatedArray) -> list[int]:
    return [d % w.ndim for d in w.axes]


@base.transposed.register
def _transposed(w: RotatedArray, order: Sequence[int]) -> RotatedArray:
    axes = tuple(list(order).index(d) - w.ndim for d in _axes(w))
    return _both(w, lambda x: base.transposed(x, order)).replace(axes=axes)


@base.cut.register
def _cut(w: RotatedArray, cuts: Mapping[int, Cut]) -> RotatedArray:
    if any(d in cuts for d in _axes(w)):
        raise NoView
    signs = base.cut(w.signs, {d: c for d, c in cuts.items() if w.signs.shape[d] > 1})
    return w.replace(array=base.cut(w.array, cuts), signs=signs)


@base.reshaped.register
def _reshaped(w: RotatedArray, new: tuple[int, ...]) -> RotatedArray:
    runs = matching_runs(w.shape, new) or []
    axes, signs = [], [1] * len(new)
    for d, size in enumerate(w.signs.shape):
        if size == 1 and d not in _axes(w):
            continue
        found = [news for olds, news in runs if d in olds and w.shape[d] == _size(w.shape, olds)]
        wide = [e for news in found for e in news if new[e] == w.shape[d]]
        if not wide:
            raise NoView
        signs[wide[0]] = size
    for d in _axes(w):
        news = next(news for olds, news in runs if d in olds)
        axes.append(next(e for e in news if new[e] == w.shape[d]) - len(new))
    array, own = base.reshaped(w.array, new), w.signs.reshape(signs)
    return RotatedArray(array, own, tuple(axes))


def _size(shape: tuple[int, ...], axes: Sequence[int]) -> int:
    size = 1
    for d in axes:
        size *= shape[d]
    return size


@base.flipped.register
def _flipped(w: RotatedArray, axes: Sequence[int]) -> RotatedArray:
    if any(d % w.ndim in _axes(w) for d in axes):
        raise NoView
    return _both(w, lambda x: base.flipped(x, axes))


@base.scaled.register
def _scaled(w: RotatedArray, factor: Value) -> RotatedArray:
    return w.replace(array=base.scaled(w.array, factor))


@base.rescaled.register
def _rescaled(w: RotatedArray, factors: jax.Array) -> RotatedArray:
    if any(factors.shape[d] > 1 for d in _axes(w)):
        raise NoView
    return w.replace(array=base.rescaled(w.array, factors))


@base.cast.register
def _cast(w: RotatedArray, dtype: DTypeLike) -> RotatedArray:
    return w.replace(array=base.cast(w.array, dtype))


@base.stacked.register
def _stacked(w: RotatedArray, length: int) -> RotatedArray:
    if w.ndim == len(w.axes):
        raise NoView
    return _both(w, lambda x: base.stacked(x, length))
