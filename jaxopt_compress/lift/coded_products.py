"""Products of an activation's codes with a weight's, times the steps of both.

Integers are summed exactly in int32, 8-bit floats in float32.
"""

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import QuantizedArray, is_compressed
from jaxopt_compress.kernels import How, matmul
from jaxopt_compress.lift.operands import as_matrices, as_rows
from jaxopt_compress.lift.products import Product
from jaxopt_compress.lift.views import entrywise, plain_steps
from jaxopt_compress.numerics.codebooks import Codebook
from jaxopt_compress.numerics.codes import levels_of
from jaxopt_compress.numerics.formats import Format
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.typing import Value


def integer_weight(w: Value, fmt: Format) -> QuantizedArray | None:
    """The weight with one int8 or int4 code per entry, if it meets activations as such."""
    # Unsigned codes of less than 8 bits are int8 numbers too.
    whole = isinstance(fmt.grid, Integers) and fmt.grid.high <= 127
    if not whole or not isinstance(w, QuantizedArray) or w.bits > 8:
        return None
    if w.masked and not w.fmt.has_zero:
        return None
    if isinstance(w.fmt.grid, Codebook) and all(x.is_integer() for x in w.fmt.grid.levels):
        w = plain_steps(entrywise(w))
        return w.replace(codes=levels_of(w.codes, w.fmt).astype(jnp.int8), format="int8")
    if not isinstance(w.fmt.grid, Integers):
        return None
    w = plain_steps(entrywise(w))
    if w.fmt.grid.signed:
        return w
    # Unsigned codes move down by half their range, and the zero points with them.
    zero = jnp.zeros(w.scale.shape, jnp.int32) if w.zero is None else w.zero.astype(jnp.int32)
    half = 2 ** (w.bits - 1)
    codes = (w.codes.astype(jnp.int16) - half).astype(jnp.int4 if w.bits == 4 else jnp.int8)
    return w.replace(codes=codes, zero=zero - half, format=f"int{w.bits}")


def steps_leave(w: QuantizedArray, how: Product) -> bool:
    """Whether sums of codes can be scaled afterwards: whole ones, or those of each group."""
    if w.group_size is None:
        return all(w.scale.shape[d] == 1 for d in how.contract[1])
    axis = w.ndim + w.checked_axis
    return axis in how.contract[1] and w.shape[axis] % w.group_size == 0


def contract_integers(
    w: QuantizedArray, codes: jax.Array, step: jax.Array, how: Product, sums: Value
) -> jax.Array:
    """The product with codes of an activation, summed in int32, times the steps of both."""
    sizes = [1 if d in how.contract[0] else n for d, n in enumerate(codes.shape)]
    steps = as_rows(jnp.broadcast_to(step, sizes), how.contract[0], how.batch[0])
    own = as_matrices(codes, w, how)
    # Rounding here would also round the part that zero points subtract afterwards.
    product = How(sums=sums if w.zero is None else None)
    return own.result(matmul(own.rows, own.operand(own.stored(w.scale)), steps, how=product))


def are_float8(w: Value, inputs: Format) -> bool:
    """Whether weight and activations are both held in 8-bit floats, in a product of one group."""
    if not isinstance(w, QuantizedArray) or w.group_size is not None or is_compressed(w.codes):
        return False
    return all(fmt.dtype.name.startswith("float8") for fmt in (w.fmt, inputs))


def contract_float8(w: QuantizedArray, codes: jax.Array, how: Product, sums: Value) -> jax.Array:
    """The product of 8-bit floats, summed in float32 and rounded to ``sums``."""
    w = plain_steps(w)
    own = as_matrices(codes, w, how)
    held = own.stored(w.scale)
    dtype = (held is not None and sums) or jnp.float32
    return own.result(matmul(own.rows, own.operand(held), how=How(dtype, sums=sums)))
