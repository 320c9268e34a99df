"""Several arrays end to end, each in its own form."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxopt_compress.arrays import CompressedArray, materialize
from jaxopt_compress.arrays.fields import pad_spec
from jaxopt_compress.lift.views import base
from jaxopt_compress.lift.views.base import Cut, NoView, Regrouping
from jaxopt_compress.typing import Value


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True)
class Joined(CompressedArray):
    """The result of `jax.numpy.concatenate` on compressed arrays inside a lifted function.

    Attributes:
        parts: Arrays and compressed arrays that differ in size along ``axis`` only.
        axis: A negative axis.
    """

    parts: tuple[Value, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes along ``axis`` added up."""
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(self.sizes)
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:  # pyright: ignore
        """That of the parts."""
        return jnp.dtype(self.parts[0].dtype)

    @property
    def sizes(self) -> list[int]:
        """The size of each part along ``axis``."""
        return [p.shape[self.axis] for p in self.parts]

    def materialize(self) -> jax.Array:
        """The dense arrays end to end."""
        return jnp.concatenate(materialize(list(self.parts)), self.axis)

    def specs(self, spec: PartitionSpec) -> "Joined":
        """Each part is split as the whole is, which is only possible across the parts."""
        if pad_spec(spec, self.ndim)[self.axis] is not None:
            raise ValueError(f"a concatenation along axis {self.axis} cannot be split by {spec}")
        nest = lambda p: p.specs(spec) if isinstance(p, CompressedArray) else spec
        return self.replace(parts=tuple(map(nest, self.parts)))

    def each(self, fn: Callable[[Value], Value], axis: int | None = None) -> "Joined":
        """``fn`` of each part, joined along another axis if need be."""
        return Joined(tuple(map(fn, self.parts)), self.axis if axis is None else axis)

    def bounds(self) -> list[Cut]:
        """The cut along ``axis`` that each part is."""
        starts = itertools.accumulate(self.sizes, initial=0)
        return [Cut(s, n) for s, n in zip(starts, self.sizes, strict=False)]


@base.transposed.register
def _transposed(w: Joined, order: Sequence[int]) -> Joined:
    axis = tuple(order).index(w.ndim + w.axis) - w.ndim
    return w.each(lambda p: base.transposed(p, order), axis)


@base.cut.register
def _cut(w: Joined, cuts: Mapping[int, Cut]) -> Value:
    """Along the joint axis, a range is cut out of the parts that it meets."""
    axis = w.ndim + w.axis
    across = {d: c for d, c in cuts.items() if d != axis}
    if axis not in cuts:
        return w.each(lambda p: base.cut(p, across))
    start, size, stride = cuts[axis]
    if not isinstance(start, int) or stride != 1:
        raise NoView
    parts = []
    for part, (begin, length, _) in zip(w.parts, w.bounds(), strict=True):
        low, high = max(start, begin), min(start + size, begin + length)
        whole = (low, high) == (begin, begin + length)
        own = across if whole else {**across, axis: Cut(low - begin, high - low)}
        if high > low:
            parts.append(base.cut(part, own))
    if not parts:
        raise NoView
    return parts[0] if len(parts) == 1 else Joined(tuple(parts), w.axis)


@base.reshaped.register
def _reshaped(w: Joined, new: tuple[int, ...]) -> Joined:
    """Other axes than the joint one are merged and split."""
    how = Regrouping.of(w.shape, new, w.ndim + w.axis)
    if how.place is None or new[how.place] != w.shape[w.axis]:
        raise NoView
    shapes = iter([how.shape(p.shape, True) for p in w.parts])
    return w.each(lambda p: base.reshaped(p, next(shapes)), how.place - len(new))


@base.flipped.register
def _flipped(w: Joined, axes: Sequence[int]) -> Joined:
    parts = [base.flipped(p, axes) for p in w.parts]
    return Joined(tuple(parts[::-1] if w.ndim + w.axis in axes else parts), w.axis)


@base.scaled.register
def _scaled(w: Joined, factor: Value) -> Joined:
    return w.each(lambda p: base.scaled(p, factor))


@base.cast.register
def _cast(w: Joined, dtype: DTypeLike) -> Joined:
    return w.each(lambda p: base.cast(p, dtype))


@base.stacked.register
def _stacked(w: Joined, length: int) -> Joined:
    if w.ndim + w.axis == 0:
        raise NoView
    return w.each(lambda p: base.stacked(p, length))
