"""Products written with arrays alone, through the one table."""

import jax.numpy as jnp

from jaxopt_compress.kernels import How, Operand, matmul


def scaled_dot(x, codes, scale, zero=None, *, group=None, dtype=jnp.float32, sums=None):
    """With codes, whose type is the format."""
    w = Operand(codes, scale, zero, format=codes.dtype.name, group=group)
    return matmul(x, w, how=How(dtype, sums=sums))


def planar_dot(x, words, scale, zero=None, *, bits, block, group=None, sums=None):
    """With words of signed integers."""
    w = Operand(words, scale, zero, format=f"int{bits}", group=group, block=block)
    return matmul(x, w, how=How(sums=sums))


def integer_dot(x_codes, codes, scale, x_scale=None, *, group=None, sums=None):
    """With codes of an activation."""
    w = Operand(codes, scale, format=codes.dtype.name, group=group)
    return matmul(x_codes, w, x_scale, how=How(sums=sums))
