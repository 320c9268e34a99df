"""Contractions of a dense array with a weight in planar words, which stay packed in memory.

Words are broadcast over their planes and shifted, with plane and word as two contracting
dimensions: merging those into one, or one product per plane, writes unpacked copies on TPUs.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_compress.kernels.cpu_dots import streamed_dot, streams
from jaxopt_compress.kernels.dots import (
    converted,
    dequantized,
    partials_outgrow_weight,
    sum_groups,
    zero_product,
)
from jaxopt_compress.kernels.forms import ACCELERATORS, check_shapes, on_each_platform, row_count


def planar_dot(
    x,
    words,
    scale,
    zero=None,
    *,
    bits,
    block,
    group=None,
    preferred=jnp.float32,
    sums=None,
    precision=None,
):
    """Contracts `x` with a weight packed in planes of 1, 2 or 4 bits.

    Within each block of `block` consecutive `k`, word `i` holds element `i + j * block * bits / 8`
    in bits `[j * bits, (j + 1) * bits)`, as two's complement. Unlike neighbours in one byte, planes
    unpack without moving elements between lanes. The sum is that of `scaled_dot`.

    Args:
      x: `[*batch, M, K]`, floating point.
      words: `[*batch, K * bits / 8, N]`, uint8.
      scale: `[*batch, K / group or 1, N or 1]`, floating point.
      zero: integer zero points of the shape of `scale`, or None.
      bits: 1, 2 or 4.
      block: number of consecutive `k` that are packed together; divides the group, and is a
        multiple of `8 / bits`.
      group: number of consecutive `k` that share a scale; None means all of them.
      preferred: type of the result, and of sums if `sums` is None.
      sums: type that accelerators round sums to before scales multiply them, where all `k` share a
        scale: then what they keep and add up over devices takes no more bytes than a dense product
        of this type would. CPUs ignore it.
      precision: as in `jax.lax.dot_general`.

    Returns:
      `[*batch, M, N]` of type `preferred`.

    Raises:
      ValueError: if the shapes do not fit each other, the block or the group.

    Example:
      >>> words = jnp.array([[0b11_10_01_00]], jnp.uint8)  # 0, 1, -2, -1
      >>> print(planar_dot(jnp.ones((1, 4)), words, jnp.array([[0.5]]), bits=2, block=4))
      [[-1.]]
    """
    if bits not in (1, 2, 4):
        raise ValueError(f"bits must be 1, 2 or 4, got {bits}")
    depth = words.shape[-2] * 8 // bits
    check_shapes(x, depth, words.shape, scale, zero, group)
    groups = scale.shape[-2]
    if block * bits % 8 or (depth // groups) % block:
        raise ValueError(
            f"block must be a multiple of {8 // bits} that divides the {depth // groups} elements "
            f"of a group, got {block}"
        )
    scale = scale.astype(preferred)
    x = _planes_first(x, groups, depth // groups // block, 8 // bits)

    def partials(x, words, scale, sums=None):
        codes = _unpack(words, groups, bits)
        return sum_groups(x, converted(codes, x.dtype), scale, precision, sums)

    def unpacked(x, words, scale):
        codes = _unpack(words, groups, bits)
        codes = codes.reshape(*words.shape[:-2], depth, words.shape[-1])
        return dequantized(x, codes, scale, precision)

    default, forms = partials, {}
    if groups == 1 and sums is not None:
        forms |= dict.fromkeys(ACCELERATORS, functools.partial(partials, sums=sums))
    if groups > 1 and partials_outgrow_weight(x, groups):
        default, forms["tpu"] = unpacked, partials
    if streams(row_count(x), words, groups, bits):
        linear = partials if groups == 1 else unpacked
        forms["cpu"] = functools.partial(
            streamed_dot, bits=bits, precision=precision, linear=linear
        )
    y = on_each_platform(forms, default, x, words, scale)
    return y if zero is None else y - zero_product(x, scale, zero)


def _planes_first(x, groups, blocks, planes):
    """Reorders K within each group as if the group were one block of planes.

    Moving the activations is cheaper than a third contracting dimension, which the compiler may
    answer with a dense copy of the weight.
    """
    split = x.reshape(*x.shape[:-1], groups, blocks, planes, -1)
    return split.swapaxes(-3, -2).reshape(x.shape)


def _unpack(words, groups, bits):
    """Spreads planar words to int8 codes `[*batch, groups, planes, words of a group, N]`."""
    *batch, depth, columns = words.shape
    planes, width = 8 // bits, depth // groups
    words = words.reshape(*batch, groups, 1, width, columns)
    spread = jnp.broadcast_to(words, (*batch, groups, planes, width, columns))
    left = (8 - bits * np.arange(1, planes + 1)).astype(np.uint8)[:, None, None]
    shifted = lax.shift_left(spread, jnp.broadcast_to(left, spread.shape))
    signed = lax.bitcast_convert_type(shifted, jnp.int8)
    return lax.shift_right_arithmetic(signed, jnp.full_like(signed, 8 - bits))
