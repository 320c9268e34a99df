"""Views of arrays around another form of the same array: views of the form inside."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxopt_compress.arrays import FakeQuantizedArray, InputQuantizedArray
from jaxopt_compress.lift.views import base
from jaxopt_compress.lift.views.base import Cut, NoView
from jaxopt_compress.typing import Value


def _with_steps(
    w: InputQuantizedArray, weight: Value, fn: Callable[[jax.Array], jax.Array]
) -> InputQuantizedArray:
    """Another weight, and ``fn`` of the steps and offsets."""
    own = lambda x: None if x is None else fn(x)
    return w.replace(weight=weight, scale=own(w.scale), offset=own(w.offset))


@base.transposed.register
def _transposed(w: InputQuantizedArray, order: Sequence[int]) -> InputQuantizedArray:
    return _with_steps(w, base.transposed(w.weight, order), lambda x: jnp.transpose(x, order))


@base.cut.register
def _cut(w: InputQuantizedArray, cuts: Mapping[int, Cut]) -> InputQuantizedArray:
    own = lambda x: base.cut(x, {d: c for d, c in cuts.items() if x.shape[d] > 1})
    return _with_steps(w, base.cut(w.weight, cuts), own)


@base.reshaped.register
def _reshaped(w: InputQuantizedArray, new: tuple[int, ...]) -> InputQuantizedArray:
    if w.scale is not None and w.scale.size != 1:
        raise NoView
    one = lambda x: x.reshape([1] * len(new))
    return _with_steps(w, base.reshaped(w.weight, new), one)


@base.flipped.register
def _flipped(w: InputQuantizedArray, axes: Sequence[int]) -> InputQuantizedArray:
    if w.scale is not None and any(w.scale.shape[d] > 1 for d in axes):
        raise NoView
    return w.replace(weight=base.flipped(w.weight, axes))


@base.scaled.register
def _scaled(w: InputQuantizedArray, factor: Value) -> InputQuantizedArray:
    return w.replace(weight=base.scaled(w.weight, factor))


@base.rescaled.register
def _rescaled(w: InputQuantizedArray, factors: jax.Array) -> InputQuantizedArray:
    return w.replace(weight=base.rescaled(w.weight, factors))


@base.cast.register
def _cast(w: InputQuantizedArray, dtype: DTypeLike) -> InputQuantizedArray:
    return w.replace(weight=base.cast(w.weight, dtype))


@base.stacked.register
def _stacked(w: InputQuantizedArray, length: int) -> InputQuantizedArray:
    return _with_steps(w, base.stacked(w.weight, length), lambda x: base.stacked(x, length))


def _of_form(view: Value) -> None:
    @view.register
    def _(w: FakeQuantizedArray, how: Value) -> FakeQuantizedArray:
        return w.replace(form=view(w.form, how))


# Values are cast after they were rounded: a shorter float may be next to another level.
for _view in (
    base.transposed,
    base.cut,
    base.reshaped,
    base.flipped,
    base.stacked,
    base.cast,
):
    _of_form(_view)


@base.scaled.register
def _scaled_values(w: FakeQuantizedArray, factor: Value) -> FakeQuantizedArray:
    form = base.scaled(w.form, factor)
    return w.replace(form=form.replace(codes=base.scaled(w.form.codes, factor)))
