"""Views of arrays whose axes come in another order: views of the array inside, along its axes."""

from collections.abc import Mapping, Sequence

from jax.typing import DTypeLike

from jaxopt_compress.arrays import PermutedArray
from jaxopt_compress.lift.views import base
from jaxopt_compress.lift.views.base import Cut, NoView
from jaxopt_compress.typing import Value


@base.transposed.register
def _transposed(w: PermutedArray, order: Sequence[int]) -> Value:
    lead = w.ndim - len(w.axes)
    if list(order[:lead]) != list(range(lead)):
        raise NoView
    axes = tuple(list(order).index(w.ndim + a) - w.ndim for a in w.axes)
    return w.array if list(axes) == sorted(axes) else w.replace(axes=axes)


@base.cut.register
def _cut(w: PermutedArray, cuts: Mapping[int, Cut]) -> PermutedArray:
    return w.replace(array=base.cut(w.array, {w.order[d]: c for d, c in cuts.items()}))


@base.reshaped.register
def _reshaped(w: PermutedArray, new: tuple[int, ...]) -> Value:
    del w, new
    raise NoView


@base.flipped.register
def _flipped(w: PermutedArray, axes: Sequence[int]) -> PermutedArray:
    return w.replace(array=base.flipped(w.array, [w.order[d] for d in axes]))


@base.scaled.register
def _scaled(w: PermutedArray, factor: Value) -> PermutedArray:
    return w.replace(array=base.scaled(w.array, factor))


@base.cast.register
def _cast(w: PermutedArray, dtype: DTypeLike) -> PermutedArray:
    return w.replace(array=base.cast(w.array, dtype))


@base.stacked.register
def _stacked(w: PermutedArray, length: int) -> PermutedArray:
    if w.ndim == len(w.axes):
        raise NoView
    return w.replace(array=base.stacked(w.array, length))
