"""Views of arrays with factors: views of the array, and of the factors."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxopt_compress.arrays import ScaledArray
from jaxopt_compress.lift.views import base
from jaxopt_compress.lift.views.base import Cut, NoView, Regrouping
from jaxopt_compress.typing import PyTree, Value


def _both(w: ScaledArray, fn: Callable[[PyTree], PyTree]) -> ScaledArray:
    return w.replace(array=fn(w.array), factors=fn(w.factors))


@base.transposed.register
def _transposed(w: ScaledArray, order: Sequence[int]) -> ScaledArray:
    return _both(w, lambda x: base.transposed(x, order))


@base.cut.register
def _cut(w: ScaledArray, cuts: Mapping[int, Cut]) -> ScaledArray:
    own = {d: c for d, c in cuts.items() if w.factors.shape[d] > 1}
    if any(w.factors.shape[d] != w.shape[d] for d in own):
        raise NoView
    factors = base.cut(w.factors, own)
    return w.replace(array=base.cut(w.array, cuts), factors=factors)


@base.reshaped.register
def _reshaped(w: ScaledArray, new: tuple[int, ...]) -> ScaledArray:
    shape = Regrouping.of(w.shape, new, None).shape(w.factors.shape)
    return w.replace(array=base.reshaped(w.array, new), factors=w.factors.reshape(shape))


@base.flipped.register
def _flipped(w: ScaledArray, axes: Sequence[int]) -> ScaledArray:
    return _both(w, lambda x: base.flipped(x, axes))


@base.scaled.register
def _scaled(w: ScaledArray, factor: Value) -> ScaledArray:
    return w.replace(array=base.scaled(w.array, factor))


@base.rescaled.register
def _rescaled(w: ScaledArray, factors: jax.Array) -> ScaledArray:
    if any(n > 1 and m == 1 for n, m in zip(factors.shape, w.factors.shape, strict=True)):
        return w.replace(array=base.rescaled(w.array, factors))
    if any(n > 1 and n != m for n, m in zip(factors.shape, w.factors.shape, strict=True)):
        raise NoView
    return w.replace(factors=w.factors * factors.astype(jnp.float32))


@base.cast.register
def _cast(w: ScaledArray, dtype: DTypeLike) -> ScaledArray:
    return w.replace(array=base.cast(w.array, dtype))


@base.stacked.register
def _stacked(w: ScaledArray, length: int) -> ScaledArray:
    if w.ndim == 0:
        raise NoView
    return _both(w, lambda x: base.stacked(x, length))
