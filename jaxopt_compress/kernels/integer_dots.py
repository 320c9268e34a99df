"""Products of integer codes with integer codes, accumulated in int32.

Int32 holds any sum of 2^17 - 1 products of int8 with int8, 2^21 - 1 of int8 with int4, and 33025 of
uint8 with uint8. Deeper sums are cut into parts that it holds, which are added up in float32. See
README.md beside this file for which form serves which compiler.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from jaxopt_compress.kernels import cpu_dots
from jaxopt_compress.kernels.forms import (
    differentiated_as,
    matrix_product,
    row_count,
    spread_out,
    wide_of,
    with_rows_merged,
)
from jaxopt_compress.kernels.stored import columns_per_byte, readable

# Codes up to which CPU takes less time for all of a weight than for its blocks, and those of one.
_WHOLE, _BLOCK = 2**22, 2**21
# Codes up to which launching more kernels costs more than it saves, for one row and for more.
_SMALL = (2**16, 2**18)


def exact_parts(depth, *dtypes):
    """Into how many parts to cut a sum of products of codes, so that int32 holds each of them.

    As few as possible, or up to twice as many if those are of one size without padding.

    Args:
      depth: number of products.
      *dtypes: of the two codes.

    Example:
      >>> exact_parts(2**17 - 1, jnp.int8, jnp.int8), exact_parts(2**18, jnp.int8, jnp.int8)
      (1, 4)
    """
    kinds = [jnp.iinfo(dtype) for dtype in dtypes]
    most = (2**31 - 1) // math.prod(max(int(kind.max), -int(kind.min)) for kind in kinds)
    few = max(-(-depth // most), 1)
    return next((n for n in range(few, 2 * few) if depth % n == 0), few)


def in_parts(codes, axis, groups, parts):
    """Each group along `axis` in parts, as a batch dimension; zeros make them of one size."""
    axis %= codes.ndim
    before, after = codes.shape[:axis], codes.shape[axis + 1 :]
    if short := -(codes.shape[axis] // groups) % parts:
        codes = codes.reshape(*before, groups, -1, *after)
        codes = jnp.pad(codes, [(0, short * (d == axis + 1)) for d in range(codes.ndim)])
    return jnp.moveaxis(codes.reshape(*before, groups * parts, -1, *after), axis, -3)


def by_parts(x_codes, codes, scale, x_scale=None, form=None):
    """As `per_group`, with several products per group, each of which is exact in int32."""
    groups = scale.shape[-2]
    parts = exact_parts(codes.shape[-2] // groups, x_codes.dtype, codes.dtype)
    own = [in_parts(a, axis, groups, parts) for a, axis in ((x_codes, -1), (codes, -2))]
    dtype = scale.dtype if x_scale is None else x_scale.dtype
    factors = [scale.astype(wide_of(dtype)).repeat(parts, axis=-2), x_scale]
    return _sum_scaled((form or widened)(*own), *factors).astype(dtype)


def of_one_group(x_codes, codes, scale, x_scale=None, form=None, sums=None):
    """One product, scaled afterwards.

    Args:
      x_codes: `[*batch, M, K]`, integers of up to eight bits.
      codes: `[*batch, K, N]`, likewise. Signed ones are faster.
      scale: `[*batch, 1, N or 1]`, floating point.
      x_scale: `[*batch, M, 1]`, or None; of the type of `scale`, or float32 beside a shorter one,
        and then not to be differentiated.
      form: the product of codes, in int32; by default `widened`.
      sums: type that sums are rounded to before scales multiply them, or None.

    Returns:
      `[*batch, M, N]`, of the type of `x_scale`, or of `scale` without.
    """
    scale = scale if x_scale is None else scale.astype(x_scale.dtype)
    y = (form or widened)(x_codes, codes)
    y = y.astype(sums or scale.dtype).astype(scale.dtype) * scale
    return y if x_scale is None else y * x_scale


def rows_after(form):
    """A form of `x_codes`, `codes` and `scale` with the scales of rows multiplied afterwards.

    TPUs write a result in a shorter type only if they are inside of the sum over groups.
    """

    def run(x_codes, codes, scale, x_scale=None):
        if x_scale is None:
            return form(x_codes, codes, scale)
        return form(x_codes, codes, scale.astype(x_scale.dtype)) * x_scale

    return run


def as_stored(x_codes, codes):
    """One product, of the types as they are."""
    return matrix_product(x_codes, codes, jnp.int32)


def widened(x_codes, codes):
    """One product of int8, which libraries have; of int32 if an operand does not fit into int8."""
    fit = all(jnp.iinfo(a.dtype).max <= 127 for a in (x_codes, codes))
    kind = jnp.int8 if fit else jnp.int32
    x, rows = x_codes.astype(kind), x_codes.shape[-2]
    if rows == 1 and (x.ndim > 2 or codes.dtype.name in ("int4", "uint4")):
        # XLA for GPU turns a product with one row into a reduction, which it fails to compile for
        # int4, and for which it writes out int32 in a batch.
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)])
    return as_stored(x, codes.astype(kind))[..., :rows, :]


def laid_out(x_codes, codes):
    """As `widened`, with the codes as they are written: `[K, N]`.

    XLA for CPU reads a transposed weight of integers entry by entry. To turn it first takes far
    less than the product; where nothing is turned, nothing is copied.
    """
    rows_first = Layout(tuple(range(codes.ndim)))
    return widened(x_codes, with_layout_constraint(codes, rows_first))


def per_group(x_codes, codes, scale, x_scale=None, form=widened):
    """One product per group, as a batch dimension; `form` multiplies."""
    groups = scale.shape[-2]
    # XLA for TPU would lay out anew what codes are rounded from, in float32, instead of them.
    x_codes = lax.optimization_barrier(x_codes)
    x = x_codes.reshape(*x_codes.shape[:-1], groups, -1).swapaxes(-3, -2)
    spread = codes.reshape(*codes.shape[:-2], groups, -1, codes.shape[-1])
    return _sum_scaled(form(x, spread), scale, x_scale)


def group_by_group(x_codes, codes, scale, form=widened):
    """As `per_group`, in a loop: the products of all groups together may be large."""
    groups = scale.shape[-2]
    x = x_codes.reshape(*x_codes.shape[:-1], groups, -1)
    spread = codes.reshape(*codes.shape[:-2], groups, -1, codes.shape[-1])

    def product(i):
        own, weight = x[..., i, :], lax.dynamic_index_in_dim(spread, i, -3, keepdims=False)
        factor = lax.dynamic_slice_in_dim(scale, i, 1, axis=-2)
        return form(own, weight).astype(scale.dtype) * factor

    return lax.fori_loop(1, groups, lambda i, y: y + product(i), product(0))


def block_diagonal(x_codes, codes, scale, x_scale=None, form=widened):
    """One product with `x_codes` spread out to one row per group; `form` multiplies."""
    *batch, rows, _ = x_codes.shape
    groups = scale.shape[-2]
    partial = form(spread_out(x_codes, groups), codes)
    partial = partial.reshape(*batch, groups, rows, codes.shape[-1])
    return _sum_scaled(partial, scale, x_scale)


def _sum_scaled(partial, scale, x_scale):
    """Sums `[*batch, groups, M, N]` times the scales over groups; see `integer_dot`."""
    scale = scale[..., None, :]
    if x_scale is not None:
        x_scale = x_scale[..., None, :, :]
        if (scale.dtype, x_scale.dtype) == (jnp.bfloat16, jnp.float32):
            # XLA for TPU would write out all scales in the wider type. After a product with a power
            # of two, which is exact, there is nothing left to convert ahead of that with codes.
            power, x_scale = _power_and_rest(x_scale)
            scale = scale * power.astype(scale.dtype)
        scale = scale.astype(x_scale.dtype) * x_scale
    return (partial.astype(scale.dtype) * scale).sum(-3)


def _power_and_rest(x):
    """Float32 as powers of two times numbers of magnitude 1 to 2; NaN, infinities stay such."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    power = lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)
    rest = lax.bitcast_convert_type(bits & ~0x7F800000 | 0x3F800000, jnp.float32)
    return power, jnp.where(jnp.isfinite(x), rest, x)


def streams(x_codes, codes, groups):
    """Whether `streamed` pays, by shapes alone."""
    size, several = math.prod(codes.shape[-2:]), row_count(x_codes) > 1
    costly = groups > 1 or columns_per_byte(codes) > 1
    return size > (_WHOLE if several and not costly else _SMALL[several])


def streamed(x_codes, codes):
    """One product of int8, for CPUs."""
    return with_rows_merged(_streamed)(x_codes, codes)


def streamed_groups(linear):
    """`linear(x_codes, codes, scale)`, which is differentiated, in the form for CPUs."""
    return differentiated_as(linear, with_rows_merged(_streamed))


def _streamed(x_codes, codes, *scales):
    scale: Any = scales[0] if scales else None
    groups = scale.shape[-2] if scales else 1
    if cpu_dots.fits_one_row(x_codes, codes, groups):
        return cpu_dots.one_row(x_codes.astype(jnp.int32), codes, scale)
    stored, code = readable(codes)
    return cpu_dots.in_order_of_columns(_in_blocks, x_codes, stored, scale, code)


def _in_blocks(x_codes, stored, scale, code):
    weight = (stored,) if scale is None else (stored, scale)
    return cpu_dots.one_by_one(functools.partial(_matrix_in_blocks, code=code), x_codes, *weight)


def _matrix_in_blocks(x_codes, stored, scale: Any = None, *, code):
    """A product of matrices by blocks of K: of one group each, or as large as the cache."""
    depth, columns = stored.shape
    group = depth if scale is None else depth // scale.shape[0]
    width = columns * code.across
    words = group if group * width <= _WHOLE else cpu_dots.divisor(group, _BLOCK // width)
    words = words if words >= 32 else group
    x, stored, scales = cpu_dots.segments(x_codes, stored, scale, code, words)

    def block(i):
        fields = [code.read(stored[i], k) for k in range(code.across)]
        if code.across > 1:
            fields = [field.astype(jnp.int8) for field in fields]
        y = jnp.concatenate([widened(x[:, i, 0], field) for field in fields], axis=-1)
        return y if scale is None else y.astype(scale.dtype) * scales[i]

    y = block(0)
    return y if len(stored) == 1 else lax.fori_loop(1, len(stored), lambda i, y: y + block(i), y)
