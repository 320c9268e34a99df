"""Products with tensor trains, core after core, and lookups in them."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.arrays import TensorTrainArray
from jaxopt_compress.lift.interpreter import Call
from jaxopt_compress.lift.lookups import filled
from jaxopt_compress.lift.products import Product, contract, contraction_rule, dense_operand, dot
from jaxopt_compress.numerics.rounding import promoted
from jaxopt_compress.typing import Value


@contract.register
def _contract_train(w: TensorTrainArray, x: jax.Array, how: Product) -> Value:
    """From the first core to the last, or from the last to the first where columns are summed."""
    stack, (batch_x, batch) = w.ndim - 2, how.batch
    summed = how.contract[1]
    if len(summed) != 1 or summed[0] < stack or tuple(batch) != tuple(range(stack)):
        return NotImplemented
    rows = summed[0] == stack
    (axis,) = how.contract[0]
    free = [d for d in range(x.ndim) if d not in batch_x and d != axis]
    x = jnp.transpose(x, (*batch_x, *free, axis))
    lead, kept = x.shape[:stack], x.shape[stack:-1]
    x = x.reshape(*lead, math.prod(kept), x.shape[-1])
    if w.multiplications(rows) > math.prod(w.shape[-2:]):
        met = ((stack + 1,), summed), (tuple(range(stack)), tuple(range(stack)))
        y = dot(x, dense_operand(w, x.dtype), how._replace(contract=met[0], batch=met[1]))
    else:
        y = _core_after_core(w, x, rows, how)
        if y is NotImplemented:
            return y
    return y.reshape(*lead, *kept, -1)


def _order(w: TensorTrainArray, rows: bool) -> tuple[list[int], Sequence[int], Sequence[int]]:
    """The cores in order, and the digits that are summed over and that are left."""
    sizes, count = w.sizes, len(w.cores)
    if rows:
        return list(range(count)), sizes.rows, sizes.columns
    return list(range(count))[::-1], sizes.columns, sizes.rows


def _core_after_core(w: TensorTrainArray, x: jax.Array, rows: bool, how: Product) -> Value:
    """``[*stack, count, m]`` from ``[*stack, count, n]``."""
    order, summed, left = _order(w, rows)
    stack, count = w.ndim - 2, x.shape[-2]
    lead = x.shape[:stack]
    size = math.prod(summed)
    x = jnp.pad(x, [(0, 0)] * (stack + 1) + [(0, size - x.shape[-1])])
    wide = promoted(how.dtype, jnp.float32) if x.dtype == jnp.float32 else x.dtype
    batch = (tuple(range(stack)),) * 2
    ranks, done, digits = w.sizes.ranks, 1, [summed[k] for k in order]
    for at, k in enumerate(order):
        rest, inner = math.prod(digits[at + 1 :]), ranks[k] if rows else ranks[k + 1]
        # [done, inner, digit, rest] going from the first, [rest, digit, inner, done] from the last.
        if rows:
            x = x.reshape(*lead, count, done, inner, summed[k], rest)
            x = jnp.moveaxis(x, -1, stack + 1)
        else:
            x = x.reshape(*lead, count, rest, summed[k], inner, done)
            x = jnp.moveaxis(x, -1, stack + 2)
        x = x.reshape(*lead, count, x.shape[stack + 1], x.shape[stack + 2], inner * summed[k])
        own = ((stack + 3,), (stack if rows else stack + 1,)), batch
        x = contract(w.cores[k], x, how._replace(contract=own[0], batch=own[1], dtype=wide))
        if x is NotImplemented:
            return x
        if rows:
            # [rest, done, (left, rank)] -> [done, left, rank, rest]
            x = x.reshape(*lead, count, rest, done, left[k], ranks[k + 1])
            x = jnp.moveaxis(x, stack + 1, -1)
        else:
            # [rest, done, (rank, left)] -> [rest, rank, left, done]
            x = x.reshape(*lead, count, rest, done, ranks[k], left[k])
            x = jnp.moveaxis(x, stack + 2, -1)
        done *= left[k]
    x = x.reshape(*lead, count, done)
    return x[..., : w.shape[-1] if rows else w.shape[-2]].astype(how.dtype)


@contraction_rule("gather", TensorTrainArray)
def _gather(call: Call, at: int, values: Sequence[Value]) -> Value:
    """Rows as products of slices of cores; the table is not made."""
    spec, sizes = call.params["dimension_numbers"], call.params["slice_sizes"]
    w, indices = values
    of_rows = tuple(spec.start_index_map) == tuple(spec.collapsed_slice_dims) == (0,)
    if at != 0 or w.ndim != 2 or not of_rows or sizes[1] != w.shape[1]:
        return NotImplemented
    lead = indices.ndim - 1
    row = jnp.clip(indices[..., 0], 0, w.shape[0] - 1)
    train = w.sizes
    digits = []
    for n in train.rows[:0:-1]:
        digits.append(row % n)
        row = row // n
    digits = [row, *digits[::-1]]
    wide = promoted(call.out.dtype, jnp.float32)
    y = jnp.ones((*indices.shape[:-1], 1, 1), wide)
    for k, core in enumerate(w.cores):
        r, n, m, s = train.ranks[k], train.rows[k], train.columns[k], train.ranks[k + 1]
        # Slices [r, m, s] of a core, for each digit.
        table = dense_operand(core, wide).reshape(r, n, m * s)
        found = jnp.moveaxis(jnp.take(table, digits[k], axis=1), 0, lead)
        y = jnp.einsum("...br,...rc->...bc", y, found, precision=lax.Precision.HIGHEST)
        y = y.reshape(*y.shape[:lead], -1, s)
    y = y.reshape(*y.shape[:lead], -1)[..., : w.shape[1]]
    y = jnp.moveaxis(y, range(lead, y.ndim), spec.offset_dims)
    return filled(call, y.astype(call.out.dtype), w.shape, indices)
