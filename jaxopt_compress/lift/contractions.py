"""The rules for products: which operand is the weight, and what each kind of weight makes of it.

Sparse weights are expanded, one at a time, where they are used: XLA has no sparse product.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import (
    InputQuantizedArray,
    LowRankArray,
    PermutedArray,
    QuantizedArray,
)
from jaxopt_compress.lift import quantized_products
from jaxopt_compress.lift.interpreter import Call, Turned
from jaxopt_compress.lift.products import (
    Place,
    Product,
    contract,
    contraction_rule,
    dense_operand,
    dot,
)
from jaxopt_compress.lift.views import STORED, Joined, cast, cut
from jaxopt_compress.numerics.rounding import promoted
from jaxopt_compress.typing import Value

del quantized_products  # imported for the product that it registers


@contract.register
def _contract_low_rank(w: LowRankArray, x: jax.Array, how: Product) -> Value:
    """``(x u) v``, or ``(x v^T) u^T`` where the right side is summed over."""
    ndim, cut = w.ndim, w.ndim - w.out_ndim
    batch = how.batch[1]
    stack = len(batch)
    left, right = tuple(range(stack, cut)), tuple(range(cut, ndim))
    summed = tuple(sorted(how.contract[1]))
    if tuple(sorted(batch)) != tuple(range(stack)) or summed not in (left, right):
        return NotImplemented
    # The stack of the factors has to be the batch of the product: left axes follow it, of size 1.
    v = w.v.shape
    if stack >= cut or v[:stack] != w.shape[:stack] or any(n != 1 for n in v[stack : cut - 1]):
        return NotImplemented
    first, second, other = w.u, w.v, cut - 1
    if summed == right:
        first, second, other = w.v, w.u, ndim - 1
    wide = promoted(how.dtype, jnp.float32) if x.dtype == jnp.float32 else x.dtype
    thin = contract(first, x, how._replace(dtype=wide))
    if thin is NotImplemented:
        return NotImplemented
    free_x = thin.shape[stack : thin.ndim - (ndim - stack - len(summed))]
    # All free axes of the first factor but the rank have size 1.
    lead = thin.shape[:stack]
    thin = thin.reshape(*lead, *free_x, w.rank)
    met = ((thin.ndim - 1,), (other,)), (tuple(range(stack)), batch)
    y = contract(second, thin, how._replace(contract=met[0], batch=met[1]))
    if y is NotImplemented:
        return NotImplemented
    kept = [d for d in range(stack, ndim) if d not in summed]
    return y.reshape(*lead, *free_x, *(w.shape[d] for d in kept))


@contract.register
def _contract_permuted(w: PermutedArray, x: jax.Array, how: Product) -> Value:
    """The product with the array before it was permuted, whose axes are then put in order."""
    lies = lambda axes: tuple(w.order[d] for d in axes)
    own = how._replace(
        contract=(how.contract[0], lies(how.contract[1])),
        batch=(how.batch[0], lies(how.batch[1])),
        place=None,
    )
    y = contract(w.array, x, own)
    if y is NotImplemented:
        return y
    free = lies(d for d in range(w.ndim) if d not in (*how.contract[1], *how.batch[1]))
    first = y.ndim - len(free)
    # They come in the order of the array inside.
    return jnp.transpose(y, (*range(first), *(first + sorted(free).index(d) for d in free)))


@contract.register
def _contract_joined(w: Joined, x: jax.Array, how: Product) -> Value:
    """A sum over the parts where they are summed over, otherwise their products end to end."""
    (x_summed, summed), (x_batch, batch) = how.contract, how.batch
    axis = w.ndim + w.axis
    met = dict(zip((*summed, *batch), (*x_summed, *x_batch), strict=True)).get(axis)
    wide = how if axis not in summed else how._replace(dtype=promoted(how.dtype, jnp.float32))
    results = []
    for part, bounds in zip(w.parts, w.bounds(), strict=True):
        own = x if met is None else cut(x, {met: bounds})
        y = contract(part, own, wide)
        results.append(dot(own, dense_operand(part, x.dtype), wide) if y is NotImplemented else y)
    if axis in summed:
        return sum(results[1:], results[0]).astype(how.dtype)
    free = [d for d in range(w.ndim) if d not in summed and d not in batch]
    if axis in batch:
        return jnp.concatenate(results, batch.index(axis))
    return jnp.concatenate(results, results[0].ndim - len(free) + free.index(axis))


def untransposed(w: Value, turned: Turned, how: Product) -> tuple[Value, Product]:
    """A product with a transpose as one with its original, if the axes of that stay in order."""
    own = w.weight if isinstance(w, InputQuantizedArray) else w
    if not isinstance(own, QuantizedArray):
        return w, how
    lies = lambda axes: tuple(turned.order[d] for d in axes)
    met = [(of_x, lies(of_w)) for of_x, of_w in (how.contract, how.batch)]
    free = lies(d for d in range(w.ndim) if d not in (*how.contract[1], *how.batch[1]))
    if list(free) != sorted(free):
        return w, how
    # Its type may be another one by now, but not its fields.
    w = cast(turned.array, w.dtype)
    place = turned.layer and Place(w, turned.layer)
    return w, how._replace(contract=met[0], batch=met[1], place=place)


@contraction_rule("dot_general", *STORED)
def _dot_general(call: Call, at: int, values: Sequence[Value]) -> Value:
    ((lhs, rhs), (lhs_batch, rhs_batch)) = call.params["dimension_numbers"]
    x, w = values[1 - at], values[at]
    pair = lambda left, right: (tuple(left), tuple(right))
    order = pair if at == 1 else lambda left, right: pair(right, left)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return NotImplemented
    given = call.out.dtype, call.params["precision"], call.replay.pallas
    layer = call.operands[at].layer
    place = layer and Place(w, layer)
    how = Product(order(lhs, rhs), order(lhs_batch, rhs_batch), *given, place)
    if call.operands[at].turned is not None:
        w, how = untransposed(w, call.operands[at].turned, how)
    if x.size and call.out.size:
        y = contract(w, x, how)
    else:
        y = dot(x, dense_operand(w, x.dtype), how)  # No form is made for products of nothing.
    if y is NotImplemented or at == 1:
        return y
    # The weight came first: its free axes go before those of the activation.
    stack, free = len(lhs_batch), len(w.shape) - len(lhs) - len(lhs_batch)
    first = y.ndim - free
    return jnp.transpose(y, (*range(stack), *range(first, y.ndim), *range(stack, first)))


@contraction_rule("ragged_dot_general ragged_dot", *STORED)
def _ragged_dot(call: Call, at: int, values: Sequence[Value]) -> Value:
    """Products with one weight per group of rows take codes as an operand, the scale fused."""
    if at != 1:
        return NotImplemented
    x, w, *rest = values
    factored = isinstance(w, LowRankArray) and w.ndim == 3 and w.out_ndim == 1
    for factor in (w.u, w.v) if factored else (w,):
        operands = (x, dense_operand(factor, x.dtype), *rest)
        x = call.eqn.primitive.bind(*operands, **call.params)
    return x
