"""Contractions of a dense array with a quantized weight that keep the weight compressed.

Codes are converted inside the operand of the product: integers of eight bits are exact in
bfloat16, and scales multiply the float32 result. XLA for TPU fuses the conversion, so that neither
a dense weight nor its unpacked codes are written to memory, and so does XLA for GPU if it is one
conversion, of whole integers or floats that share a scale; XLA for CPU writes one layer's weight,
and `cpu_dots` has forms of its own. How the expression is written decides, so the forms are chosen
from static shapes, by what the compiler makes of them:

* One scale per output channel: one product, scaled afterwards. XLA for TPU does so by itself with
  scales in the short type of the activation, written as factors of the weight, and fuses more.
* Groups: a product per group, as a batch dimension, with the scaled sum over groups fused into it
  on TPU. For few rows of `x`, TPU's cost model favours a block-diagonal `x`, one block per group:
  the weight then keeps the shape in which a scanned stack holds it, and is read straight from
  there. Elsewhere the partial products are written out; once they outgrow the dense weight,
  dequantizing takes less memory than they do.
* Planar words: see `planar_dots`.

Multiplying by group scales before the product streams on some TPUs and writes a dense copy on
others.
"""

import functools

import jax.numpy as jnp
from jax import lax

from jaxopt_compress.kernels.cpu_dots import streamed_dot, streams
from jaxopt_compress.kernels.forms import (
    GPUS,
    check_shapes,
    on_each_platform,
    row_count,
    spread_out,
)
from jaxopt_compress.numerics.rounding import promoted

# Rows of a block-diagonal x up to which the additional products stay cheaper than a copy of codes.
_MAX_BLOCK_DIAGONAL_ROWS = 512


def scaled_dot(
    x,
    codes,
    scale,
    zero=None,
    *,
    group=None,
    decode=None,
    preferred=jnp.float32,
    sums=None,
    precision=None,
):
    r"""Contracts `x` with a weight stored as codes, scales and integer zero points.

    .. math:: y_{mn} = \sum_k x_{mk} (q_{kn} - z_{\lfloor k/g \rfloor n}) s_{\lfloor k/g \rfloor n}

    Zero points enter as :math:`-\sum_g (\sum_{k \in g} x_{mk}) z_{gn} s_{gn}`, a product over
    groups instead of weights.

    Args:
      x: `[*batch, M, K]`, floating point.
      codes: `[*batch, K, N]`, an integer or float type of at most eight bits.
      scale: `[*batch, K / group or 1, N or 1]`, floating point.
      zero: integer zero points of the shape of `scale`, or None.
      group: number of consecutive `k` that share a scale; None means all of them.
      decode: an elementwise function from codes to the numbers that they stand for; None if that is
        their value.
      preferred: type of the result, and of sums if `sums` is None.
      sums: type that accelerators round sums to before scales multiply them, where all `k` share a
        scale: then what they keep and add up over devices takes no more bytes than a dense product
        of this type would. On TPUs scales are factors of the weight, in this type, if `scale`
        and `x` are given in it. CPUs ignore it.
      precision: as in `jax.lax.dot_general`.

    Returns:
      `[*batch, M, N]` of type `preferred`.

    Raises:
      ValueError: if the shapes do not fit each other or the group.

    Example:
      >>> x = jnp.ones((1, 4))
      >>> codes = jnp.array([[1], [2], [3], [4]], jnp.int8)
      >>> print(scaled_dot(x, codes, jnp.array([[0.5], [10.0]]), group=2))
      [[71.5]]
    """
    check_shapes(x, codes.shape[-2], codes.shape, scale, zero, group)
    short = sums is not None and sums == scale.dtype == x.dtype and zero is None
    scale = scale.astype(preferred)
    groups = scale.shape[-2]

    def of_codes(form, **given):
        read = decode or (lambda codes: codes)
        return lambda x, codes, scale: form(x, read(codes), scale, precision, **given)

    default = linear = of_codes(scaled_after if groups == 1 else dequantized)
    forms = {}
    if groups == 1 and (sums is not None or x.dtype.itemsize < 4):
        forms["tpu"] = of_codes(scaled_in_short) if short else of_codes(scaled_after, sums=sums)
        # GPUs fuse one conversion.
        forms |= dict.fromkeys(GPUS, of_codes(scaled_after, sums=sums, convert=_directly))
    if groups > 1:
        few = groups * row_count(x) <= _MAX_BLOCK_DIAGONAL_ROWS
        forms["tpu"] = of_codes(block_diagonal if few else per_group)
        default = linear if partials_outgrow_weight(x, groups) else of_codes(per_group)
        if decode is not None:
            # GPUs write out the levels in either form, and would write the partials besides.
            forms |= dict.fromkeys(GPUS, linear)
    if streams(row_count(x), codes, groups):
        given = {"decode": decode, "precision": precision, "linear": linear}
        forms["cpu"] = functools.partial(streamed_dot, **given)
    y = on_each_platform(forms, default, x, codes, scale)
    return y if zero is None else y - zero_product(x, scale, zero)


def converted(codes, dtype):
    """Codes as floats, by way of float32: a TPU without short float arithmetic converts faster."""
    return codes.astype(_wide(dtype)).astype(dtype)


def _directly(codes, dtype):
    return codes.astype(dtype)


def scaled_after(x, codes, scale, precision=None, sums=None, convert=converted):
    """One product, scaled afterwards; arguments as for `per_group`, of one group."""
    y = _matmul(x, convert(codes, x.dtype), sums or scale.dtype, precision)
    return y.astype(scale.dtype) * scale


def scaled_in_short(x, codes, scale, precision=None):
    """One product with levels times steps in the type of `x`; XLA for TPU takes the steps out."""
    weight = converted(codes, x.dtype) * scale.astype(x.dtype)
    return _matmul(x, weight, x.dtype, precision).astype(scale.dtype)


def per_group(x, codes, scale, precision=None):
    """One product per group, as a batch dimension.

    Args:
      x: `[*batch, M, K]`, floating point.
      codes: `[*batch, K, N]`.
      scale: `[*batch, groups, N or 1]`, of the type of the result.
      precision: as in `jax.lax.dot_general`.

    Returns:
      `[*batch, M, N]` of the type of `scale`.
    """
    spread = codes.reshape(*codes.shape[:-2], scale.shape[-2], -1, codes.shape[-1])
    return sum_groups(x, spread.astype(x.dtype), scale, precision)


def block_diagonal(x, codes, scale, precision=None):
    """One product with `x` spread out to one row per group; arguments as for `per_group`."""
    *batch, rows, _ = x.shape
    groups = scale.shape[-2]
    blocks = spread_out(x, groups)
    partial = _matmul(blocks, converted(codes, x.dtype), scale.dtype, precision)
    partial = partial.reshape(*batch, groups, rows, codes.shape[-1])
    return (partial * scale[..., None, :]).sum(-3)


def dequantized(x, codes, scale, precision=None):
    """A product with the dense weight; arguments as for `per_group`.

    The weight is rounded to the type of `x`, as a stored one would be.
    """
    wide = _wide(x.dtype)
    repeated = jnp.repeat(scale.astype(wide), codes.shape[-2] // scale.shape[-2], axis=-2)
    weight = (codes.astype(wide) * repeated).astype(x.dtype)
    return _matmul(x, weight, scale.dtype, precision)


def sum_groups(x, codes, scale, precision, sums=None):
    """Sums scaled partial products over groups.

    Args:
      x: `[*batch, M, K]`.
      codes: `[*batch, groups, *inner, N]` of the type of `x`; `inner` are the dimensions, one or
        more, that a group's share of K is made of.
      scale: `[*batch, groups, N or 1]` of the type of the result.
      precision: as in `jax.lax.dot_general`.
      sums: type that sums are rounded to before they are scaled; None for that of the result.
    """
    batch, groups = x.ndim - 2, scale.shape[-2]
    inner = codes.shape[batch + 1 : -1]
    x = x.reshape(*x.shape[:-1], groups, *inner)
    shared = tuple(range(batch))
    shared = (shared, shared)
    if groups == 1:
        x, codes = x.squeeze(batch + 1), codes.squeeze(batch)
    else:
        shared = ((*shared[0], batch + 1), (*shared[1], batch))
    n = len(inner)
    last = (tuple(range(x.ndim - n, x.ndim)), tuple(range(codes.ndim - n - 1, codes.ndim - 1)))
    y = lax.dot_general(
        x, codes, (last, shared), precision=precision, preferred_element_type=sums or scale.dtype
    ).astype(scale.dtype)
    return y * scale if groups == 1 else (y * scale[..., None, :]).sum(-3)


def zero_product(x, scale, zero):
    """Sums `x` over each group and contracts with the scaled zero points, both in full precision.

    The sums are not exact in a short type, so the product asks for the highest precision; it is
    smaller than the product with the codes by the size of a group.
    """
    groups = scale.shape[-2]
    sums = x.astype(_wide(x.dtype)).reshape(*x.shape[:-1], groups, -1).sum(-1)
    offsets = zero.astype(scale.dtype) * scale
    if groups == 1:
        return (sums * offsets).astype(scale.dtype)
    return _matmul(sums, offsets.astype(sums.dtype), scale.dtype, lax.Precision.HIGHEST)


def _matmul(x, weight, preferred, precision):
    batch = tuple(range(x.ndim - 2))
    dims = (((x.ndim - 1,), (x.ndim - 2,)), (batch, batch))
    return lax.dot_general(x, weight, dims, precision=precision, preferred_element_type=preferred)


def _wide(dtype):
    whole = jnp.issubdtype(dtype, jnp.integer)  # Of which those of four bits are not promoted.
    return jnp.dtype(jnp.float32) if whole else promoted(dtype, jnp.float32)


def partials_outgrow_weight(x, groups):
    """Whether float32 products per group take more memory than the dense weight would."""
    return groups * row_count(x) * 4 > x.shape[-1] * x.dtype.itemsize
