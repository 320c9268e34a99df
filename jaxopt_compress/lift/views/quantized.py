"""Views of quantized arrays: each field is whole, constant, or counted in groups along an axis."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxopt_compress.arrays import QuantizedArray, SparseArray, is_compressed
from jaxopt_compress.lift.views import base
from jaxopt_compress.lift.views.base import Cut, NoView, Regrouping
from jaxopt_compress.numerics.codes import encode
from jaxopt_compress.numerics.groups import spread_to
from jaxopt_compress.typing import Value


def entrywise(q: QuantizedArray) -> QuantizedArray:
    """The same array with one plain code per entry, for views that words or masks do not have."""
    if q.block is None and not isinstance(q.codes, SparseArray):
        return q
    codes = q.unpacked()
    if q.masked:
        if not q.fmt.has_zero:
            raise NoView
        zero = encode(jnp.zeros((), jnp.float32), q.fmt) if q.zero is None else q.per_entry(q.zero)
        zero = jnp.broadcast_to(zero, codes.shape).astype(codes.dtype)
        codes = jnp.where(q.codes.mask(), codes, zero)
    return q.replace(codes=codes, block=None)


def _plain(q: QuantizedArray) -> QuantizedArray:
    """The same array with one array for each field, and groups along one axis at most."""
    q = q if q.tile is None and not is_compressed(q.scale) else plain_steps(q)
    return entrywise(q) if isinstance(q.codes, SparseArray) else q


def plain_steps(q: QuantizedArray) -> QuantizedArray:
    """The same array with one float32 step per group along one axis at most."""
    if q.tile is None and q.scale.dtype == jnp.float32 and not is_compressed(q.scale):
        return q
    cuts = () if q.tile is None else (q.tile,)
    wide = lambda x: None if x is None else spread_to(x, cuts, q.shape)
    return q.replace(scale=wide(q.steps()), zero=wide(q.zero), tile=None)


def _map_fields(
    q: QuantizedArray, fn: Callable[[jax.Array], jax.Array], **meta: Any
) -> QuantizedArray:
    zero = None if q.zero is None else fn(q.zero)
    return q.replace(codes=fn(q.codes), scale=fn(q.scale), zero=zero, **meta)


def _front(q: QuantizedArray) -> int | None:
    return None if q.axis is None else q.ndim + q.checked_axis


@base.transposed.register
def _transposed(q: QuantizedArray, order: Sequence[int]) -> QuantizedArray:
    q, axis = _plain(q), _front(q)
    axis = None if axis is None else tuple(order).index(axis) - q.ndim
    return _map_fields(q, lambda x: jnp.transpose(x, order), axis=axis)


@base.cut.register
def _cut(q: QuantizedArray, cuts: Mapping[int, Cut]) -> QuantizedArray:
    """Cuts every field along the axes that it has in full; along groups, between them."""
    q, axis = _plain(q), _front(q)
    q = entrywise(q) if axis in cuts else q
    own = lambda x: {d: c for d, c in cuts.items() if x.shape[d] == q.shape[d]}
    if q.group_size is None or axis is None or axis not in cuts:
        return _map_fields(q, lambda x: base.cut(x, own(x)))
    groups = _whole_groups(cuts[axis], q.group_size, q.shape[axis])
    counted = lambda x: base.cut(x, {**own(x), axis: groups})
    zero = None if q.zero is None else counted(q.zero)
    return q.replace(codes=base.cut(q.codes, cuts), scale=counted(q.scale), zero=zero)


def _whole_groups(cut: Cut, group: int, length: int) -> Cut:
    start, size, stride = cut
    if not isinstance(start, int) or stride != 1 or start % group:
        raise NoView
    if size % group and start + size != length:
        raise NoView
    return Cut(start // group, -(-size // group))


@base.reshaped.register
def _reshaped(q: QuantizedArray, new: tuple[int, ...]) -> QuantizedArray:
    q = _plain(q)
    try:
        return _regrouped(q, new)
    except NoView:
        if q.block is None:
            raise
        return _regrouped(entrywise(q), new)


def _regrouped(q: QuantizedArray, new: tuple[int, ...]) -> QuantizedArray:
    """Merges and splits axes; groups and words go on along the last part of their own."""
    how = Regrouping.of(q.shape, new, _front(q))
    if q.group_size is not None or q.block is not None:
        length, unit = q.shape[q.checked_axis], math.lcm(q.group_size or 1, q.block or 1)
        now = None if how.place is None else new[how.place]
        # A short last group stays the last one only while its axis is as it was.
        if now is None or (now != length and (length % unit or now % unit)):
            raise NoView
    codes = q.codes.reshape(how.shape(q.codes.shape, q.block is not None))
    steps = lambda x: x.reshape(how.shape(x.shape, q.group_size is not None))
    axis = None if how.place is None else how.place - len(new)
    zero = None if q.zero is None else steps(q.zero)
    return q.replace(codes=codes, scale=steps(q.scale), zero=zero, axis=axis)


@base.flipped.register
def _flipped(q: QuantizedArray, axes: Sequence[int]) -> QuantizedArray:
    q, axis = _plain(q), _front(q)
    if axis in axes:
        q = entrywise(q)
        if q.group_size is not None:
            raise NoView
    return _map_fields(q, lambda x: lax.rev(x, [d for d in axes if x.shape[d] > 1]))


@base.scaled.register
def _scaled(q: QuantizedArray, factor: Value) -> QuantizedArray:
    return q.replace(scale=q.steps() * jnp.asarray(factor, jnp.float32))


@base.rescaled.register
def _rescaled(q: QuantizedArray, factors: jax.Array) -> QuantizedArray:
    """Factors of scales, as long as there are no more of these than a channel or group has."""
    scale = q.steps()
    whole = np.broadcast_shapes(factors.shape, q.shape) == q.shape
    cut = {q.ndim + d if d < 0 else d for d, _ in q.cuts}
    if not whole or any(factors.shape[d] > 1 for d in cut):
        raise NoView
    sizes = np.broadcast_shapes(scale.shape, factors.shape)
    if math.prod(sizes) > max(scale.size, factors.size):
        raise NoView
    zero = None if q.zero is None else jnp.broadcast_to(q.zero, sizes)
    return q.replace(scale=scale * factors.astype(jnp.float32), zero=zero)


@base.cast.register
def _cast(q: QuantizedArray, dtype: DTypeLike) -> QuantizedArray:
    return q.replace(dtype=jnp.dtype(dtype))


@base.stacked.register
def _stacked(q: QuantizedArray, length: int) -> QuantizedArray:
    """Copies scales; an axis that groups or words run along cannot become a stack."""
    q = _plain(q)
    if q.ndim < 3 or (_front(q) == 0 and (q.group_size is not None or q.block is not None)):
        raise NoView
    axis = -1 if _front(q) == 0 else q.axis
    return _map_fields(q, lambda x: base.stacked(x, length), axis=axis)
