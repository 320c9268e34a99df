"""Views of arrays with codebooks: codes as the dense array, centroids where they are as long."""

import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxopt_compress.arrays import CodebookArray, SparseArray
from jaxopt_compress.arrays.codebook import code_dtype
from jaxopt_compress.lift.views import base
from jaxopt_compress.lift.views.base import Cut, NoView, Regrouping
from jaxopt_compress.typing import Value


def plain_codes(w: CodebookArray) -> CodebookArray:
    """The same array with one plain code for each vector; masks have none."""
    if isinstance(w.codes, SparseArray):
        raise NoView
    if w.block is None:
        return w
    return w.replace(codes=w.unpacked().astype(code_dtype(w.clusters)), block=None)


def _front(w: CodebookArray) -> int:
    return w.ndim + w.axis


@base.transposed.register
def _transposed(w: CodebookArray, order: Sequence[int]) -> CodebookArray:
    codes = base.transposed(w.codes, order)
    if isinstance(w.codes, SparseArray) and not isinstance(codes, SparseArray):
        raise NoView  # The codes of entries that are left out stand for no value.
    axis = tuple(order).index(_front(w)) - w.ndim
    return w.replace(codes=codes, centroids=jnp.transpose(w.centroids, order), axis=axis)


@base.cut.register
def _cut(w: CodebookArray, cuts: Mapping[int, Cut]) -> CodebookArray:
    axis = _front(w)
    if axis in cuts:
        if w.vector > 1 or w.groups > 1:
            raise NoView
        w = plain_codes(w)
    own = {d: c for d, c in cuts.items() if d != axis and w.centroids.shape[d] == w.shape[d]}
    codes = base.cut(w.codes, cuts)
    if isinstance(w.codes, SparseArray) and not isinstance(codes, SparseArray):
        raise NoView
    return w.replace(codes=codes, centroids=base.cut(w.centroids, own))


@base.reshaped.register
def _reshaped(w: CodebookArray, new: tuple[int, ...]) -> CodebookArray:
    axis = _front(w)
    if w.groups > 1:
        raise NoView
    sparse = isinstance(w.codes, SparseArray)
    how = Regrouping.of(w.shape, new, axis)
    if how.place is None:
        raise NoView
    words = w.block is not None and new[how.place] % (w.block * w.vector)
    w = plain_codes(w) if words else w
    if new[how.place] % w.vector:
        raise NoView
    size = w.centroids.shape[axis]
    one = list(w.centroids.shape)
    one[axis] = 1
    books = list(how.shape(one))
    books[how.place] *= size
    if sparse:
        codes = base.reshaped(w.codes, new)
        if not isinstance(codes, SparseArray):
            raise NoView
    else:
        codes = w.codes.reshape(how.shape(w.codes.shape, w.vector > 1 or w.block is not None))
    return w.replace(codes=codes, centroids=w.centroids.reshape(books), axis=how.place - len(new))


@base.flipped.register
def _flipped(w: CodebookArray, axes: Sequence[int]) -> CodebookArray:
    w, axis = plain_codes(w), _front(w)
    if axis in axes and (w.vector > 1 or w.groups > 1):
        raise NoView
    long = [d for d in axes if d != axis and w.centroids.shape[d] > 1]
    return w.replace(codes=lax.rev(w.codes, axes), centroids=lax.rev(w.centroids, long))


@base.scaled.register
def _scaled(w: CodebookArray, factor: Value) -> CodebookArray:
    centroids = w.centroids.astype(jnp.float32) * jnp.asarray(factor, jnp.float32)
    return w.replace(centroids=centroids)


@base.rescaled.register
def _rescaled(w: CodebookArray, factors: Value) -> CodebookArray:
    """Factors of centroids, where those of an index are its own."""
    axis = _front(w)
    fits = all(
        n == 1 or (d != axis and w.centroids.shape[d] == n) for d, n in enumerate(factors.shape)
    )
    if not fits:
        raise NoView
    return w.replace(centroids=w.centroids.astype(jnp.float32) * factors.astype(jnp.float32))


@base.cast.register
def _cast(w: CodebookArray, dtype: DTypeLike) -> CodebookArray:
    return w.replace(dtype=jnp.dtype(dtype))


@base.stacked.register
def _stacked(w: CodebookArray, length: int) -> CodebookArray:
    """Copies codebooks; an axis along which codes run cannot become a stack."""
    if _front(w) == 0 or math.prod(w.shape) == 0:
        raise NoView
    codes = base.stacked(w.codes, length)
    return w.replace(codes=codes, centroids=base.stacked(w.centroids, length))
