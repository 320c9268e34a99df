"""Products with codes that XLA is to convert inside of the operand.

Codes are converted, and scales multiply the result or the operand; how that is written decides what
a compiler makes of it. See README.md beside this file.
"""

import jax.numpy as jnp
from jax import lax

from jaxopt_compress.kernels.forms import matrix_product, spread_out, wide_of


def converted(codes, dtype):
    """Codes as floats, by way of float32: a TPU without short float arithmetic converts faster."""
    return codes.astype(wide_of(dtype)).astype(dtype)


def directly(codes, dtype):
    """Codes as floats by one conversion."""
    return codes.astype(dtype)


def scaled_after(x, codes, scale, precision=None, sums=None, convert=converted):
    """One product, scaled afterwards; arguments as for `per_group`, of one group."""
    y = matrix_product(x, convert(codes, x.dtype), sums or scale.dtype, precision)
    return y.astype(scale.dtype) * scale


def scaled_in_short(x, codes, scale, precision=None):
    """One product with levels times steps in the type of `x`; XLA for TPU takes the steps out."""
    weight = converted(codes, x.dtype) * scale.astype(x.dtype)
    return matrix_product(x, weight, x.dtype, precision).astype(scale.dtype)


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
    partial = matrix_product(blocks, converted(codes, x.dtype), scale.dtype, precision)
    partial = partial.reshape(*batch, groups, rows, codes.shape[-1])
    return (partial * scale[..., None, :]).sum(-3)


def dequantized(x, codes, scale, precision=None):
    """A product with the dense weight; arguments as for `per_group`.

    The weight is rounded to the type of `x`, as a stored one would be.
    """
    wide = wide_of(x.dtype)
    repeated = jnp.repeat(scale.astype(wide), codes.shape[-2] // scale.shape[-2], axis=-2)
    weight = (codes.astype(wide) * repeated).astype(x.dtype)
    return matrix_product(x, weight, scale.dtype, precision)


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


def transposed_weight(x, codes, scale, precision=None):
    """As `scaled_after`, with codes `[*batch, N, K]`."""
    batch = tuple(range(x.ndim - 2))
    dims = (((x.ndim - 1,), (x.ndim - 1,)), (batch, batch))
    y = lax.dot_general(x, converted(codes, x.dtype), dims, precision, scale.dtype)
    return y * scale


def zero_product(x, scale, zero):
    """Sums `x` over each group and contracts with the scaled zero points, both in full precision.

    The sums are not exact in a short type, so the product asks for the highest precision; it is
    smaller than the product with the codes by the size of a group.

    Args:
      x: `[*batch, M, K]`, an activation or its codes.
      scale: `[*batch, groups, N or 1]`, of the type of the result.
      zero: integer zero points of the shape of `scale`.
    """
    groups = scale.shape[-2]
    sums = x.astype(wide_of(x.dtype)).reshape(*x.shape[:-1], groups, -1).sum(-1)
    offsets = zero.astype(scale.dtype) * scale
    if groups == 1:
        return (sums * offsets).astype(scale.dtype)
    return matrix_product(sums, offsets.astype(sums.dtype), scale.dtype, lax.Precision.HIGHEST)
