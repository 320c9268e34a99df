"""Views of tensor trains: transposes, stacks and numbers in front; digits have no others."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxopt_compress.arrays import PermutedArray, TensorTrainArray
from jaxopt_compress.lift.views import base
from jaxopt_compress.lift.views.base import Cut, NoView


@base.transposed.register
def _transposed(w: TensorTrainArray, order: Sequence[int]) -> TensorTrainArray | PermutedArray:
    lead = w.ndim - 2
    if list(order[:lead]) != list(range(lead)):
        raise NoView
    return w if list(order) == sorted(order) else PermutedArray(w, (-1, -2))


@base.cut.register
def _cut(w: TensorTrainArray, cuts: Mapping[int, Cut]) -> TensorTrainArray:
    if any(d >= w.ndim - 2 for d in cuts):
        raise NoView
    return w.replace(cores=tuple(base.cut(x, cuts) for x in w.cores))


@base.reshaped.register
def _reshaped(w: TensorTrainArray, new: tuple[int, ...]) -> TensorTrainArray:
    """Axes of the stack are merged, split, and come and go."""
    if len(new) < 2 or tuple(new[-2:]) != w.shape[-2:]:
        raise NoView
    return w.replace(cores=tuple(base.reshaped(x, (*new[:-2], *x.shape[-2:])) for x in w.cores))


@base.flipped.register
def _flipped(w: TensorTrainArray, axes: Sequence[int]) -> TensorTrainArray:
    if any(d >= w.ndim - 2 for d in axes):
        raise NoView
    return w.replace(cores=tuple(base.flipped(x, axes) for x in w.cores))


@base.scaled.register
def _scaled(w: TensorTrainArray, factor: jax.Array) -> TensorTrainArray:
    return w.replace(cores=(base.scaled(w.cores[0], factor), *w.cores[1:]))


@base.cast.register
def _cast(w: TensorTrainArray, dtype: DTypeLike) -> TensorTrainArray:
    return w.replace(dtype=jnp.dtype(dtype))


@base.stacked.register
def _stacked(w: TensorTrainArray, length: int) -> TensorTrainArray:
    if w.ndim < 3:
        raise NoView
    return w.replace(cores=tuple(base.stacked(x, length) for x in w.cores))
