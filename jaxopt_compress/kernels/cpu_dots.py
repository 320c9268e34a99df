"""Forms of a product with a quantized weight for XLA on CPU, which read each code once.

XLA for CPU does not fuse a conversion into a matrix product: written as one product, the weight is
first converted to a dense float32 copy, which is then read. A float32 weight costs four bytes per
entry; int8 written so costs one, and four to write the copy, and four to read it again. The forms
here keep what is converted in cache:

* One row of `x`: elementwise multiplications and additions of eight codes at a time, which XLA
  compiles into one vectorized loop over the codes. A sum of eight floats is written for eight codes
  read. More terms per sum would write less, but each is a stream of its own, and beyond eight rows
  of a power-of-two length they evict each other from a cache of eight ways. The sums are added up
  by a product with ones: a library that XLA hands reductions to would take the codes as copies.
* Some rows: a loop over blocks of K, each converted into a buffer that stays in cache, multiplied
  and added to the result.
* More rows, where adding up would cost more: a loop over blocks of columns instead. Arithmetic
  rules by then; what this form saves is the memory of the dense copy.

All compute in float32 at least. Derivatives are those of a form without loops, which would keep
converted blocks for the backward pass.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_compress.kernels.forms import differentiated_as, row_count, with_rows_merged
from jaxopt_compress.kernels.stored import columns_per_byte, readable
from jaxopt_compress.numerics.rounding import promoted

# Codes that are added up in registers.
_TERMS = 8
# Codes of a block that one core converts in its own cache. Up to so many, a whole weight is one.
_BLOCK = 2**16
# Otherwise blocks are this deep, of at most so many codes: larger, for several cores.
_DEPTH, _LARGE_BLOCK = 256, 2**20
# Blocks of columns have this many codes.
_COLUMN_BLOCK = 2**19
# Rows of x up to which blocks of K are faster than blocks of columns; the latter, of codes that
# take long to read.
_MAX_ROWS_IN_BLOCKS_OF_K, _MAX_ROWS_OF_DECODED = 64, 128


def streams(rows, stored, groups, bits=None):
    """Whether `streamed_dot` pays, by shapes alone.

    Args:
      rows: M.
      stored: codes or words, as an array or its type.
      groups: as many as there are scales along K.
      bits: of a code in planar words; None for codes.
    """
    size = math.prod(stored.shape[-2:]) * (1 if bits is None else 8 // bits)
    few = rows <= _MAX_ROWS_IN_BLOCKS_OF_K
    costly = groups > 1 or bits is not None or columns_per_byte(stored) > 1
    return size > (_BLOCK if few or costly else _COLUMN_BLOCK)


def streamed_dot(x, stored, scale, *, bits=None, decode=None, precision=None, linear):
    """Contracts `x` with a weight stored as codes or planar words, without a dense copy of it.

    Args:
      x: `[*batch, M, K]`, floating point; with planar words, each group's share of K in the order
        planes, words.
      stored: `[*batch, K, N]` codes, or `[*batch, K * bits / 8, N]` words of uint8.
      scale: `[*batch, groups, N or 1]`, of the type of the result.
      bits: of a code in planar words; None for codes.
      decode: an elementwise function from codes to numbers; None if they are that already.
      precision: as in `jax.lax.dot_general`.
      linear: the same function of `x`, `stored` and `scale` up to rounding; it is differentiated
        in place of this one.

    Returns:
      `[*batch, M, N]` of the type of `scale`.
    """
    product = functools.partial(_product, bits=bits, decode=decode, precision=precision)
    return differentiated_as(linear, with_rows_merged(product))(x, stored, scale)


def _product(x, stored, scale, *, bits, decode, precision):
    dtype = scale.dtype
    wide = promoted(x.dtype, dtype, jnp.float32)
    x, scale = x.astype(wide), scale.astype(wide)
    if fits_one_row(x, stored, scale.shape[-2], bits):
        return one_row(x, stored, scale, bits, decode).astype(dtype)
    stored, code = readable(stored, bits)
    if decode is not None:
        read = code.read
        code = code._replace(read=lambda *element: decode(read(*element)), decoded=True)
    form = functools.partial(_in_blocks, precision=precision)
    return in_order_of_columns(form, x, stored, scale, code).astype(dtype)


def in_order_of_columns(form, x, stored, scale, code):
    """Calls `form`, for which the columns that a stored element holds are far apart."""
    if code.across == 1:
        return form(x, stored, scale, code)
    if scale is not None:
        shape = (*scale.shape[:-1], code.across * stored.shape[-1])
        scale = _swap(jnp.broadcast_to(scale, shape), -1, code.across)
    return _swap(form(x, stored, scale, code), code.across, -1)


def fits_one_row(x, stored, groups, bits=None):
    """Whether `one_row` applies: some number of codes, near enough to eight, divides a group."""
    planes = 1 if bits is None else 8 // bits
    return x.shape[-2] == 1 and 2 * planes * _words(stored, groups, planes) >= _TERMS


def _words(stored, groups, planes):
    return math.gcd(_TERMS // planes, stored.shape[-2] // groups)


def one_row(x, stored, scale: Any, bits=None, decode=None) -> jax.Array:
    """Sums a few products with codes in registers, then those sums.

    Args:
      x: `[*batch, 1, K]`, of the type of the sums.
      stored: `[*batch, K, N]` codes, or `[*batch, K * bits / 8, N]` words of uint8.
      scale: `[*batch, groups, N or 1]`, of the type of the result, or None.
      bits: of a code in planar words; None for codes.
      decode: an elementwise function from codes to numbers, or None.

    Returns:
      `[*batch, 1, N]`.
    """
    if bits is None and (several := columns_per_byte(stored)) > 1:
        # XLA reads packed codes one by one, but from every second column on whole bytes at a time.
        signed = jnp.issubdtype(stored.dtype, jnp.signedinteger)
        kind, parts = jnp.int8 if signed else jnp.uint8, []
        for k in range(several):
            own = scale
            if scale is not None and scale.shape[-1] > 1:
                own = scale[..., k::several]
            parts.append(one_row(x, stored[..., k::several].astype(kind), own, None, decode))
        y = jnp.stack(parts, axis=-1)
        return y.reshape(*y.shape[:-2], -1)
    stored, code = readable(stored, bits)
    groups = 1 if scale is None else scale.shape[-2]
    words = _words(stored, groups, code.planes)
    x, stored, scales = segments(x, stored, scale, code, words)
    x = x[..., 0, :, :, :]
    total: Any = None
    for i, j in itertools.product(range(words), range(code.planes)):
        codes = code.read(stored[..., i, :], j)
        codes = codes if decode is None else decode(codes)
        term = x[..., j, i, None] * codes.astype(x.dtype)
        total = term if total is None else total + term
    total = total if groups == 1 else total.astype(scales.dtype) * scales
    ones = jnp.ones((*total.shape[:-2], 1, total.shape[-2]), total.dtype)
    y = jnp.matmul(ones, total, precision=lax.Precision.HIGHEST)
    return y if scale is None or groups > 1 else y.astype(scale.dtype) * scale


def one_by_one(form, x, *weight):
    """Calls `form(x, *weight)`, of matrices, for each of a batch."""
    if x.ndim == 2:
        return form(x, *weight)
    flat = tuple(a.reshape(-1, *a.shape[-2:]) for a in (x, *weight))
    y = lax.map(lambda of_one: form(*of_one), flat)
    return y.reshape(*x.shape[:-1], -1)


def _in_blocks(x, stored, scale, code, precision):
    form = functools.partial(_matrix_in_blocks, code=code, precision=precision)
    return one_by_one(form, x, stored, scale)


def _matrix_in_blocks(x, stored, scale, code, precision):
    """A product of matrices, by blocks of K or of columns."""
    (rows, depth), columns, groups = x.shape, stored.shape[1], scale.shape[0]
    planes = np.arange(code.planes)[:, None, None]

    def dot(x, stored, scale):
        """With segments `[*, words, columns]`: `[M, across, columns]`."""
        parts = []
        for k, own in enumerate(_across(scale, code)):
            codes = code.read(stored[:, None], planes + k).astype(x.dtype)
            codes = codes if groups == 1 else codes * own[:, None, None]
            parts.append(jnp.dot(x, codes.reshape(x.shape[-1], -1), precision=precision))
        return jnp.stack(parts, axis=1)

    within = stored.shape[0] // groups
    width = columns * code.across
    most = _BLOCK // width
    many = row_count(x)
    if most < max(32, 2 * many):
        most = min(_DEPTH, _LARGE_BLOCK // width)
    most //= code.planes
    words = divisor(within, most)
    count = divisor(groups * within // words, most // words)
    few = many <= _MAX_ROWS_IN_BLOCKS_OF_K
    if code.decoded and depth * width > _COLUMN_BLOCK:
        few = many <= _MAX_ROWS_OF_DECODED
    if few and words * count * code.planes >= 16:
        x, stored, scales = segments(x, stored, scale, code, words)
        x = x.reshape(rows, -1, count * code.planes * words)
        part = lambda a, i: lax.dynamic_slice_in_dim(a, i * count, count)
        slab = lambda i: dot(x[:, i], part(stored, i), part(scales, i) if groups > 1 else scales)
        y = slab(0)
        if x.shape[1] > 1:
            y = lax.fori_loop(1, x.shape[1], lambda i, y: y + slab(i), y)
    else:
        _, stored, scales = segments(x, stored, scale, code, within)
        scales = jnp.broadcast_to(scales, (groups, code.across * columns))
        scales = scales.reshape(groups, code.across, columns)
        width = min(max(_COLUMN_BLOCK // (depth * code.across), 64), columns)

        def block(start, size):
            cut = lambda a: lax.dynamic_slice_in_dim(a, start, size, axis=-1)
            return dot(x, cut(stored), cut(scales).reshape(groups, -1))

        y = lax.map(lambda i: block(i * width, width), jnp.arange(columns // width))
        y = jnp.moveaxis(y, 0, 2).reshape(rows, code.across, -1)
        if rest := columns % width:
            y = jnp.concatenate([y, block(columns - rest, rest)], axis=-1)
    y = y.reshape(rows, -1)
    return y * scale if groups == 1 else y


def _across(scale, code):
    """The entries of each of the columns that a stored element holds."""
    return [scale] if code.across == 1 else jnp.split(scale, code.across, axis=-1)


def segments(x, stored, scale: Any, code, words) -> Any:
    """Cuts each group into segments of that many stored rows.

    Returns:
      `x` as `[*batch, M, segments, planes, words]`, `stored` as `[*batch, segments, words, N]` and
      `scale`, if there are groups, as `[*batch, segments, N or 1]`.
    """
    *batch, depth, columns = stored.shape
    groups = 1 if scale is None else scale.shape[-2]
    parts = depth // groups // words
    x = x.reshape(*x.shape[:-1], groups, code.planes, parts, words).swapaxes(-3, -2)
    x = x.reshape(*x.shape[:-4], groups * parts, code.planes, words)
    stored = stored.reshape(*batch, groups * parts, words, columns)
    if scale is None or groups == 1:
        return x, stored, scale
    return x, stored, jnp.repeat(scale, parts, axis=-2)


def _swap(a, first, second):
    """Transposes the last axis as a matrix of so many rows and columns, one of them -1."""
    return a.reshape(*a.shape[:-1], first, second).swapaxes(-1, -2).reshape(a.shape)


def divisor(number, most):
    """The largest divisor of `number` up to `most`."""
    return next(d for d in range(max(min(number, most), 1), 0, -1) if number % d == 0)
