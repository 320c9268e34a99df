"""Matrix products, convolutions and lookups on the stored form of a weight.

The scale of a quantized weight leaves the product where it can: constant along the contracted axes
it multiplies the result, constant along all others it multiplies the activation. A grouped scale
multiplies the codes, as elementwise work on one operand of one product, which compilers fuse with
it. Either way no dense weight is built. Sparse weights are expanded, one at a time, where they are
used: XLA has no sparse product.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.arrays import LowRankArray, QuantizedArray, SparseArray
from jaxopt_compress.lift.interpreter import Call, leaf_rule
from jaxopt_compress.lift.views import STORED


class Product(NamedTuple):
    """A product of an activation and a weight, the weight second.

    Attributes:
        contract: ``(axes of the activation, axes of the weight)`` that are summed over.
        batch: ``(axes of the activation, axes of the weight)`` that are kept in step.
        dtype: The dtype of the result.
        precision: As in `jax.lax.dot_general`.
    """

    contract: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: Any
    precision: Any = None


def levels(w: QuantizedArray, dtype: Any) -> jax.Array:
    """``codes - zero`` in a floating dtype; integers of 8 bits and their differences fit bfloat16
    and wider up to 2**8."""
    codes = w.integers()
    if w.zero is None:
        return codes.astype(dtype)
    value = codes.astype(jnp.int32) - w.per_entry(w.zero).astype(jnp.int32)
    if isinstance(w.codes, SparseArray):
        value = jnp.where(w.codes.mask(), value, 0)
    return value.astype(jnp.float32)


def dense_operand(w: Any, dtype: Any) -> jax.Array:
    """The dense weight as elementwise work that a consumer may fuse: not sealed off."""
    if isinstance(w, QuantizedArray):
        scaled = levels(w, jnp.float32) * w.per_entry(w.scale)
        return scaled.astype(w.dtype).astype(dtype)
    return w.materialize().astype(dtype)


def contract(x: jax.Array, w: Any, how: Product) -> Any:
    """``[*batch, *free axes of x, *free axes of w]``, or NotImplemented."""
    if isinstance(w, QuantizedArray):
        return _contract_quantized(x, w, how)
    if isinstance(w, LowRankArray):
        return _contract_low_rank(x, w, how)
    if isinstance(w, SparseArray):
        w = w.materialize()
    return _dot(x, w.astype(x.dtype), how)


def _dot(x: jax.Array, w: jax.Array, how: Product, preferred: Any = None) -> jax.Array:
    return lax.dot_general(x, w, (how.contract, how.batch), how.precision, preferred or how.dtype)


def _contract_quantized(x: jax.Array, w: QuantizedArray, how: Product) -> Any:
    summed, batch = how.contract[1], how.batch[1]
    free = [d for d in range(w.ndim) if d not in summed and d not in batch]
    scale = w.scale
    wide = jnp.promote_types(how.dtype, jnp.float32)
    if w.zero is None or w.dtype == jnp.float32 or x.dtype == jnp.float32:
        operand = levels(w, x.dtype).astype(x.dtype)
        if w.group is None and all(scale.shape[d] == 1 for d in summed):
            y = _dot(x, operand, how, wide)
            return (y * _beside(scale, y.ndim, batch, free)).astype(how.dtype)
        if w.group is None and all(scale.shape[d] == 1 for d in free):
            order = (*batch, *summed)
            factor = jnp.transpose(scale, (*order, *free)).reshape([scale.shape[d] for d in order])
            places = (*how.batch[0], *how.contract[0])
            shape = [1] * x.ndim
            for place, n in zip(places, factor.shape, strict=True):
                shape[place] = n
            # Sorted places: the factor's axes must come in the order that x has them.
            factor = jnp.transpose(factor, _argsort(places)).reshape(shape)
            return _dot((x * factor).astype(x.dtype), operand, how)
    return _dot(x, dense_operand(w, x.dtype), how)


def _argsort(values: tuple[int, ...]) -> list[int]:
    return sorted(range(len(values)), key=values.__getitem__)


def _beside(scale: jax.Array, ndim: int, batch: Any, free: Any) -> jax.Array:
    """The scale, summed-over axes dropped, broadcast against ``[*batch, ..., *free]``."""
    order = (*batch, *free)
    rest = [d for d in range(scale.ndim) if d not in order]
    scale = jnp.transpose(scale, (*order, *rest))
    lead = scale.shape[: len(batch)]
    tail = scale.shape[len(batch) : len(order)]
    return scale.reshape(*lead, *(1,) * (ndim - len(order)), *tail)


def _contract_low_rank(x: jax.Array, w: LowRankArray, how: Product) -> Any:
    """``(x u) v``, or ``(x v^T) u^T`` where the right side is summed over."""
    ndim, cut = w.ndim, w.ndim - w.out_ndim
    batch = how.batch[1]
    stack = len(batch)
    left, right = tuple(range(stack, cut)), tuple(range(cut, ndim))
    summed = tuple(sorted(how.contract[1]))
    if tuple(sorted(batch)) != tuple(range(stack)) or summed not in (left, right):
        return NotImplemented
    first, second, inner, other = (w.u, w.v, ndim - 1, cut - 1)
    if summed == right:
        first, second, inner, other = w.v, w.u, cut - 1, ndim - 1
    wide = jnp.promote_types(how.dtype, jnp.float32) if x.dtype == jnp.float32 else x.dtype
    thin = contract(x, first, how._replace(dtype=wide))
    if thin is NotImplemented:
        return NotImplemented
    free_x = thin.shape[stack : thin.ndim - (ndim - stack - len(summed))]
    # Of the first factor's free axes only the rank is not of size 1.
    lead = thin.shape[:stack]
    thin = thin.reshape(*lead, *free_x, w.rank)
    back = Product(
        ((thin.ndim - 1,), (other,)),
        (tuple(range(stack)), tuple(_order_batch(how))),
        how.dtype,
        how.precision,
    )
    y = contract(thin, second, back)
    if y is NotImplemented:
        return NotImplemented
    kept = [d for d in range(stack, ndim) if d not in summed]
    return y.reshape(*lead, *free_x, *(w.shape[d] for d in kept))


def _order_batch(how: Product) -> tuple[int, ...]:
    return how.batch[1]


@leaf_rule("dot_general", *STORED)
def _dot_general(call: Call, at: int) -> Any:
    ((lhs, rhs), (lhs_batch, rhs_batch)) = call.params["dimension_numbers"]
    values = call.others(at)
    x, w = values[1 - at], values[at]
    sides = ((lhs, rhs), (lhs_batch, rhs_batch))
    contracted, batched = sides if at == 1 else tuple(s[::-1] for s in sides)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return NotImplemented
    how = Product(
        tuple(map(tuple, contracted)), tuple(map(tuple, batched)), call.out.dtype,
        call.params["precision"],
    )  # fmt: skip
    y = contract(x, w, how)
    if y is NotImplemented or at == 1:
        return y
    # The weight came first: its free axes go before those of the activation.
    stack, free = len(lhs_batch), len(w.shape) - len(lhs) - len(lhs_batch)
    first = y.ndim - free
    return jnp.transpose(y, (*range(stack), *range(first, y.ndim), *range(stack, first)))


@leaf_rule("ragged_dot_general ragged_dot", *STORED)
def _ragged_dot(call: Call, at: int) -> Any:
    """Products with one weight per group of rows take codes as an operand, the scale fused."""
    if at != 1 or isinstance(call.operands[at].array, LowRankArray):
        return NotImplemented
    values = call.others(at)
    values[1] = dense_operand(values[1], values[0].dtype)
    return call.eqn.primitive.bind(*values, **call.params)


@leaf_rule("conv_general_dilated", QuantizedArray, SparseArray)
def _conv(call: Call, at: int) -> Any:
    """The scale of an output channel multiplies the result; any other one the codes."""
    if at != 1:
        return NotImplemented
    x, w = call.others(at)
    spec = call.params["dimension_numbers"]
    out_axis = spec.rhs_spec[0]
    wide = jnp.promote_types(call.out.dtype, jnp.float32)
    per_channel = isinstance(w, QuantizedArray) and w.group is None
    if not per_channel or any(w.scale.shape[d] > 1 for d in spec.rhs_spec[1:]):
        return _conv_bind(call, x, dense_operand(w, x.dtype), call.out.dtype)
    y = _conv_bind(call, x, levels(w, x.dtype).astype(x.dtype), wide)
    shape = [1] * y.ndim
    shape[spec.out_spec[1]] = w.scale.shape[out_axis]
    return (y * w.scale.reshape(shape)).astype(call.out.dtype)


def _conv_bind(call: Call, x: jax.Array, w: jax.Array, dtype: Any, **params: Any) -> jax.Array:
    given = {**call.params, **params}
    return lax.conv_general_dilated(
        x,
        w,
        given["window_strides"],
        given["padding"],
        given["lhs_dilation"],
        given["rhs_dilation"],
        given["dimension_numbers"],
        given["feature_group_count"],
        given["batch_group_count"],
        given["precision"],
        dtype,
    )


@leaf_rule("conv_general_dilated", LowRankArray)
def _conv_low_rank(call: Call, at: int) -> Any:
    """A convolution to ``rank`` channels, then one of size 1 to the outputs."""
    params, spec = call.params, call.params["dimension_numbers"]
    w = call.operands[at].array
    last = w.ndim - 1
    grouped = params["feature_group_count"] > 1 or params["batch_group_count"] > 1
    if at != 1 or grouped or w.out_ndim != 1 or spec.rhs_spec[0] != last:
        return NotImplemented
    x, w = call.others(at)
    u, v = (dense_operand(f, x.dtype) if not isinstance(f, jax.Array) else f for f in (w.u, w.v))
    thin = _conv_bind(call, x, u.astype(x.dtype), call.out.dtype)
    # v is [1, ..., 1, rank, out]: the channel axis of the result is contracted with its rank.
    channel = spec.out_spec[1]
    v = v.reshape(w.rank, w.shape[-1]).astype(thin.dtype)
    y = jnp.tensordot(thin, v, ((channel,), (0,)), precision=params["precision"])
    return jnp.moveaxis(y, -1, channel).astype(call.out.dtype)


@leaf_rule("gather", *STORED)
def _gather(call: Call, at: int) -> Any:
    """Looks whole rows up in every field; the rest of the table is not read."""
    if at != 0:
        return NotImplemented
    w, indices = call.others(at)
    if isinstance(w, SparseArray):
        return _bind_gather(call, w.materialize(), indices, call.params["slice_sizes"])
    if isinstance(w, LowRankArray):
        return _gather_low_rank(call, w, indices)
    sizes, looked_up = call.params["slice_sizes"], call.params["dimension_numbers"].start_index_map
    bound = w.checked_axis + w.ndim if w.group is not None or w.block is not None else None
    whole = all(sizes[d] == w.shape[d] for d in range(w.ndim) if d not in looked_up)
    if not whole or bound in looked_up or isinstance(w.codes, SparseArray):
        return _bind_gather(call, dense_operand(w, w.dtype), indices, sizes)
    rows = lambda x: _gather_rows(call, x, w.shape, indices, looked_up)
    codes = rows(w.codes)
    if w.block is not None or w.group is not None:
        return _assemble_rows(call, w, rows)
    scale = rows(w.scale)
    value = codes.astype(jnp.float32)
    if w.zero is not None:
        value = value - rows(w.zero).astype(jnp.float32)
    return (value * scale).astype(call.out.dtype)


def _gather_rows(call: Call, x: jax.Array, shape: Any, indices: jax.Array, looked_up: Any):
    """The gather on a field, which may have size 1 along an axis that is looked up."""
    sizes = [
        min(n, x.shape[d]) if d in looked_up else x.shape[d]
        for d, n in enumerate(call.params["slice_sizes"])
    ]
    full = [x.shape[d] == shape[d] for d in looked_up]
    if not all(full):
        indices = jnp.where(jnp.asarray(full), indices, 0)
    fill = None
    if jnp.issubdtype(x.dtype, jnp.integer):
        # Codes have no NaN to mark a row out of bounds with; the scale, a float, carries it.
        fill = 0
    return _bind_gather(call, x, indices, tuple(sizes), fill)


def _bind_gather(call: Call, x: jax.Array, indices: jax.Array, sizes: Any, fill: Any = None):
    given = call.params
    return lax.gather(
        x,
        indices,
        given["dimension_numbers"],
        tuple(sizes),
        unique_indices=given["unique_indices"],
        indices_are_sorted=given["indices_are_sorted"],
        mode=given["mode"],
        fill_value=given["fill_value"] if fill is None else fill,
    )


def _assemble_rows(call: Call, w: QuantizedArray, rows: Any) -> Any:
    """Rows of packed or grouped fields, dequantized after the lookup."""
    spec = call.params["dimension_numbers"]
    axis = w.ndim + w.checked_axis
    kept = [d for d in range(w.ndim) if d not in spec.collapsed_slice_dims]
    place = spec.offset_dims[kept.index(axis)]
    codes, scale = rows(w.codes), rows(w.scale)
    zero = None if w.zero is None else rows(w.zero)
    row = w.replace(codes=codes, scale=scale, zero=zero, axis=place - codes.ndim)
    return dense_operand(row, call.out.dtype)


def _gather_low_rank(call: Call, w: LowRankArray, indices: jax.Array) -> Any:
    """Rows of ``u``, times ``v``: for a table looked up along its first axis."""
    spec, sizes = call.params["dimension_numbers"], call.params["slice_sizes"]
    lookup = tuple(spec.start_index_map) == tuple(spec.collapsed_slice_dims) == (0,)
    last = tuple(spec.offset_dims) == (len(call.out.shape) - 1,)
    if w.ndim != 2 or not lookup or not last or tuple(sizes) != (1, w.shape[1]):
        return NotImplemented
    u = dense_operand(w.u, w.dtype) if not isinstance(w.u, jax.Array) else w.u
    rows = _bind_gather(call, u, indices, (1, w.rank))
    how = Product(((rows.ndim - 1,), (0,)), ((), ()), call.out.dtype)
    return contract(rows, w.v, how)


def work(x: jax.Array | Any, w: Any, how: Product) -> int:
    """Floating operations of a dense product: two per weight entry and row of the activation."""
    used = {*how.contract[0], *how.batch[0]}
    rows = math.prod(n for d, n in enumerate(x.shape) if d not in used)
    return 2 * math.prod(w.shape) * rows
