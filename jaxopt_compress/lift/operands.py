"""Quantized arrays as operands of products of matrices, and where they lie for kernels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import QuantizedArray
from jaxopt_compress.kernels import Operand, Stored
from jaxopt_compress.kernels.decoded import STEPS
from jaxopt_compress.lift.products import Place, Product
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.steps import step_value
from jaxopt_compress.typing import Value

_PLANES = (1, 2, 4)


def in_planes(w: QuantizedArray) -> bool:
    """Whether codes lie in planar words that shifts to either side bring to int8."""
    grid = w.fmt.grid
    return w.block is not None and w.bits in _PLANES and isinstance(grid, Integers) and grid.signed


def operand_of(
    w: QuantizedArray,
    matrix: Callable[..., jax.Array],
    held: Stored | None,
    scale: jax.Array | None = None,
    transposed: bool = False,
) -> Operand:
    """A weight as matrices.

    Args:
        w: The weight, with one step per group along one axis at most.
        matrix: ``matrix(field, transposed)`` brings a field of the weight to its form as a matrix.
        held: The same for kernels, or None.
        scale: Its steps as a matrix, if not those of ``w``.
        transposed: Whether codes lie as ``[n, k]``.
    """
    words = in_planes(w)
    return Operand(
        matrix(w.codes if words else w.unpacked(), transposed),
        matrix(w.scale) if scale is None else scale,
        None if w.zero is None else matrix(w.zero),
        held,
        format=w.format,
        group=w.group_size,
        block=w.block if words else None,
        transposed=transposed,
    )


def stored_of(w: QuantizedArray, steps: Value, matrix: Value, how: Product) -> Stored | None:
    """A weight where it lies, if kernels may read it there.

    Args:
        w: The weight.
        steps: Its steps, an array or a `QuantizedArray`.
        matrix: ``matrix(field, transposed)`` brings a field of the weight to its form as a matrix.
        how: The product.
    """
    if not how.pallas:
        return None
    transposed, place = lie_of_matrices(w, how)
    outer = None
    if isinstance(steps, QuantizedArray):
        steps, outer = steps.codes, matrix(steps.scale)[..., :1, :]
    elif steps.dtype.name not in STEPS:
        steps = step_value(steps)

    def held(field: jax.Array) -> jax.Array:
        own = matrix(field, transposed)
        if place is None:
            return own
        stack = place.stack_of(field)
        if stack is None or own.size != field.size:
            return own[None]
        return stack.reshape(-1, *own.shape)

    codes, steps, columns = held(w.codes), held(steps), -2 if transposed else -1
    shape = list(steps.shape)
    shape[columns] = codes.shape[columns]
    layer = None if place is None else place.layer.index
    steps = jnp.broadcast_to(steps, shape)
    return Stored(codes, steps, outer, layer, block=w.block, transposed=transposed)


def lie_of_matrices(w: QuantizedArray, how: Product) -> tuple[bool, Place | None]:
    """Whether a weight lies as matrices ``[n, k]``, and where; nowhere if axes have to be moved."""
    (_, summed), (_, batch) = how.contract, how.batch
    free = [d for d in range(w.ndim) if d not in summed and d not in batch]
    summed, lies = [summed[i] for i in order_of_sums(w, how)], list(range(w.ndim))
    if [*batch, *summed, *free] == lies:
        return False, how.place
    transposed = [*batch, *free, *summed] == lies
    return transposed, how.place if transposed else None


def order_of_sums(w: QuantizedArray, how: Product) -> list[int]:
    """In which order to go through the axes that are summed over: that of groups comes last."""
    summed = how.contract[1]
    last = None if w.axis is None else w.ndim + w.axis
    return sorted(range(len(summed)), key=lambda i: (summed[i] == last, summed[i]))
