"""Products with planar words, which stay packed in memory.

Within each block of `block` consecutive `k`, word `i` holds element `i + j * block * bits / 8` in
bits `[j * bits, (j + 1) * bits)`, as two's complement. Unlike neighbours in one byte, planes unpack
without moving elements between lanes. Words are broadcast over their planes and shifted, with plane
and word as two contracting dimensions: merging those into one, or one product per plane, writes
unpacked copies on TPUs.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_compress.kernels.dots import converted, dequantized, sum_groups


def per_plane(x, words, scale, bits, precision=None, sums=None):
    """The scaled sum over groups, planes and words.

    Args:
      x: `[*batch, M, K]`, in the order of `planes_first`.
      words: `[*batch, K * bits / 8, N]`, uint8.
      scale: `[*batch, groups, N or 1]`, of the type of the result.
      bits: 1, 2 or 4.
      precision: as in `jax.lax.dot_general`.
      sums: type that sums are rounded to before they are scaled; None for that of the result.

    Returns:
      `[*batch, M, N]` of the type of `scale`.
    """
    codes = _unpack(words, scale.shape[-2], bits)
    return sum_groups(x, converted(codes, x.dtype), scale, precision, sums)


def unpacked(x, words, scale, bits, precision=None):
    """The product with the dense weight; arguments as for `per_plane`."""
    codes = _unpack(words, scale.shape[-2], bits)
    codes = codes.reshape(*words.shape[:-2], words.shape[-2] * 8 // bits, words.shape[-1])
    return dequantized(x, codes, scale, precision)


def planes_first(x, groups, blocks, planes):
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
