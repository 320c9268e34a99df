"""Products with the stored form of a quantized weight.

The step leaves the product where it can: constant along the contracted axes it multiplies the
result, constant along all others it multiplies the activation. A grouped step multiplies partial
products, or the codes, as `kernels.dots` decides. Either way no dense weight is built.
"""

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import QuantizedArray, SparseArray
from jaxopt_compress.kernels import How, matmul
from jaxopt_compress.lift.operands import as_matrices, lie_of_matrices
from jaxopt_compress.lift.products import (
    Product,
    aligned,
    axis_names,
    contract,
    dense_operand,
    dot,
    levels,
    short_sums,
)
from jaxopt_compress.lift.views import Cut, Joined, cut, entrywise, plain_steps
from jaxopt_compress.numerics.rounding import promoted
from jaxopt_compress.typing import Value


@contract.register
def _contract_quantized(w: QuantizedArray, x: jax.Array, how: Product) -> Value:
    if w.masked and not w.fmt.has_zero:
        return dot(x, dense_operand(w, x.dtype), how)
    given = entrywise(w) if isinstance(w.codes, SparseArray) else w
    w = plain_steps(given)
    if w.bits > 8:
        x = x.astype(promoted(x.dtype, jnp.float32))  # Codes are not exact in 16 bits.
    summed, batch, transposed = how.contract[1], how.batch[1], False
    free = tuple(d for d in range(w.ndim) if d not in summed and d not in batch)
    whole = lambda axes: all(w.scale.shape[d] == 1 for d in axes)
    if w.group_size is None and not whole(summed):
        if w.zero is None and whole(free):
            return _scaling_activation(w, x, how)
        return dot(x, dense_operand(w, x.dtype), how)
    if w.group_size is None and w.block is None:
        # As matrices, if it is stored as one: `matmul` has the better forms.
        if (*batch, *summed, *free) != tuple(range(w.ndim)):
            if not how.pallas or not lie_of_matrices(w, how)[0]:
                return _scaling_result(w, x, how)
            transposed = True
    elif w.ndim + w.checked_axis not in summed:
        return dot(x, dense_operand(w, x.dtype), how)
    if w.group_size is not None and w.shape[w.checked_axis] % w.group_size:
        return contract(_whole_and_rest(w, w.group_size), x, how)
    stored = given.scale if given.tile is None else w.scale
    return _as_matrices(w, x, how, stored, transposed)


def _scaling_activation(w: QuantizedArray, x: jax.Array, how: Product) -> jax.Array:
    """With steps along contracted axes only, which multiply the activation."""
    # Relative to the largest one: a small scale would take 16-bit activations out of range.
    top = jnp.max(jnp.abs(w.scale))
    top = jnp.where(top == 0, 1, top)
    of_x, of_w, _ = axis_names(x.ndim, w.ndim, how)
    scaled = x.astype(promoted(x.dtype, jnp.float32)) * aligned(w.scale / top, of_w, of_x)
    wide = promoted(how.dtype, jnp.float32)
    return (dot(scaled.astype(x.dtype), levels(w, x.dtype), how, wide) * top).astype(how.dtype)


def _scaling_result(w: QuantizedArray, x: jax.Array, how: Product) -> jax.Array:
    """With steps along the other axes only, which multiply the result."""
    wide = promoted(how.dtype, jnp.float32)
    y = dot(x, levels(w.replace(zero=None), x.dtype), how, wide)
    of_x, of_w, of_y = axis_names(x.ndim, w.ndim, how)
    if w.zero is not None:
        sums = x.astype(wide).sum(how.contract[0], keepdims=True)
        y = y - aligned(sums, of_x, of_y) * aligned(w.zero, of_w, of_y)
    return (y * aligned(w.scale, of_w, of_y)).astype(how.dtype)


def _as_matrices(
    w: QuantizedArray, x: jax.Array, how: Product, stored: Value, transposed: bool
) -> jax.Array:
    """The product as one of matrices.

    Args:
        w: The weight, with float32 steps.
        x: The activation.
        how: The product.
        stored: The steps of the weight as they are stored.
        transposed: Whether its codes are ``[n, k]`` and stay so.
    """
    own, sums = as_matrices(x, w, how), short_sums(how.dtype)
    scale = None
    if sums is not None and w.group_size is None and w.zero is None and stored.dtype == sums:
        scale = own.matrix(stored)  # TPUs take steps of this type into the product.
    # Levels times steps that are relative to another one may outgrow float16.
    held = own.stored(stored if x.dtype == jnp.bfloat16 else w.scale)
    dtype = jnp.float32
    if held is not None and w.zero is None and (held.outer is None or sums is not None):
        dtype = how.dtype  # Other sums, which steps multiply afterwards, may outgrow it.
    product = How(dtype, sums=sums, precision=how.precision)
    return own.result(matmul(own.rows, own.operand(held, scale, transposed), how=product))


def _whole_and_rest(w: QuantizedArray, group: int) -> Joined:
    """The whole groups of a weight, and its last one, which is shorter."""
    axis, length = w.checked_axis, w.shape[w.checked_axis]
    whole = length - length % group
    cuts = [c for c in (Cut(0, whole), Cut(whole, length - whole)) if c.size]
    return Joined(
        tuple(cut(w, {w.ndim + axis: c}).replace(group_size=min(group, c.size)) for c in cuts), axis
    )
