"""Matrix products on the stored form of a weight.

The scale of a quantized weight leaves the product where it can: constant along the contracted axes
it multiplies the result, constant along all others it multiplies the activation. A grouped scale
multiplies the codes, as elementwise work on one operand of one product, which compilers fuse with
it. Either way no dense weight is built. Sparse weights are expanded, one at a time, where they are
used: XLA has no sparse product.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from jaxopt_compress.arrays import LowRankArray, QuantizedArray, SparseArray, materialize
from jaxopt_compress.kernels import planar_dot, scaled_dot
from jaxopt_compress.lift.interpreter import Call, leaf_rule
from jaxopt_compress.lift.views import STORED, Joined, NoView, cut, entrywise


def contraction_rule(primitives: str, *types: type) -> Callable[[Any], Any]:
    """As `leaf_rule`, for ``rule(call, at, values)`` with all operands dense but the one at ``at``.

    Where mesh axes are explicit, types name shardings, and an equation says how its result is
    split. The stored form takes other equations: the compiler splits those, and the result is split
    as staged.
    """

    def register(rule: Any) -> Any:
        @leaf_rule(primitives, *types)
        def _(call: Call, at: int) -> Any:
            sharding = call.out.sharding
            if AxisType.Explicit not in sharding.mesh.axis_types:
                return rule(call, at, call.others(at))

            def run(*values: Any) -> Any:
                y = rule(call, at, values)
                if y is NotImplemented:
                    raise NoView
                return y

            try:
                return jax.sharding.auto_axes(run, out_sharding=sharding)(*call.others(at))
            except NoView:
                return NotImplemented

        return rule

    return register


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
    """``codes - zero`` in a floating dtype: float32 with zero points, else ``dtype``."""
    codes = w.integers()
    if w.zero is None:
        # By way of float32: a TPU without arithmetic in shorter floats converts faster.
        return codes.astype(jnp.promote_types(dtype, jnp.float32)).astype(dtype)
    value = codes.astype(jnp.int32) - w.per_entry(w.zero).astype(jnp.int32)
    if isinstance(w.codes, SparseArray):
        value = jnp.where(w.codes.mask(), value, 0)
    return value.astype(jnp.float32)


def dense_operand(w: Any, dtype: Any) -> jax.Array:
    """The dense weight as elementwise work that a consumer may fuse: not sealed off."""
    if isinstance(w, QuantizedArray):
        scaled = levels(w, jnp.float32) * w.per_entry(w.scale)
        return scaled.astype(w.dtype).astype(dtype)
    return materialize(w).astype(dtype)


def contract(x: jax.Array, w: Any, how: Product) -> Any:
    """``[*batch, *free axes of x, *free axes of w]``, or NotImplemented."""
    if isinstance(w, QuantizedArray):
        return _contract_quantized(x, w, how)
    if isinstance(w, LowRankArray):
        return _contract_low_rank(x, w, how)
    if isinstance(w, Joined):
        return _contract_joined(x, w, how)
    if isinstance(w, SparseArray):
        w = w.materialize()
    return _dot(x, w.astype(x.dtype), how)


def _dot(x: jax.Array, w: jax.Array, how: Product, preferred: Any = None) -> jax.Array:
    return lax.dot_general(x, w, (how.contract, how.batch), how.precision, preferred or how.dtype)


def _contract_quantized(x: jax.Array, w: QuantizedArray, how: Product) -> Any:
    w = entrywise(w) if isinstance(w.codes, SparseArray) else w
    summed, batch = how.contract[1], how.batch[1]
    free = tuple(d for d in range(w.ndim) if d not in summed and d not in batch)
    bound = w.group is not None or w.block is not None
    if w.group is None and all(w.scale.shape[d] == 1 for d in summed):
        if not bound:
            wide = jnp.promote_types(how.dtype, jnp.float32)
            y = _dot(x, levels(w.replace(zero=None), x.dtype), how, wide)
            beside = lambda field: _beside(field, y.ndim, batch, free)
            if w.zero is not None:
                y = y - _activation_sums(x, y.ndim, how, wide) * beside(w.zero)
            return (y * beside(w.scale)).astype(how.dtype)
    elif w.zero is None and w.group is None and all(w.scale.shape[d] == 1 for d in free):
        # Relative to the largest one: a small scale would take 16-bit activations out of range.
        top = jnp.max(w.scale)
        scaled = _scale_activation(x, w.replace(scale=w.scale / top), how)
        wide = jnp.promote_types(how.dtype, jnp.float32)
        return (_dot(scaled, levels(w, x.dtype), how, wide) * top).astype(how.dtype)
    elif w.group is None:
        return _dot(x, dense_operand(w, x.dtype), how)
    if bound and w.ndim + w.checked_axis not in summed:
        return _dot(x, dense_operand(w, x.dtype), how)
    return _contract_as_matrices(x, w, how, free)


def _contract_as_matrices(
    x: jax.Array, w: QuantizedArray, how: Product, free: tuple[int, ...]
) -> jax.Array:
    """The product as ``[*batch, m, k]`` times ``[*batch, k, n]``, groups and words along ``k``."""
    (x_summed, summed), (x_batch, batch) = how.contract, how.batch
    last = w.ndim + w.axis if w.axis is not None else None
    order = sorted(range(len(summed)), key=lambda i: (summed[i] == last, summed[i]))
    summed, x_summed = [summed[i] for i in order], [x_summed[i] for i in order]
    x_free = [d for d in range(x.ndim) if d not in x_summed and d not in x_batch]
    rows = jnp.transpose(x, (*x_batch, *x_free, *x_summed))
    lead, middle = rows.shape[: len(batch)], rows.shape[len(batch) : len(batch) + len(x_free)]
    rows = rows.reshape(*lead, math.prod(middle), -1)
    grouped = w.group is not None

    def matrix(field: jax.Array) -> jax.Array:
        # A field that is whole along some axes of a run has to be whole along all of them.
        full = list(field.shape)
        for d in (*batch, *free, *(d for d in summed if grouped and d != last)):
            full[d] = w.shape[d]
        field = jnp.broadcast_to(field, full)
        field = jnp.transpose(field, (*batch, *summed, *free))
        n = math.prod(full[d] for d in free)
        return field.reshape(*lead, math.prod(full[d] for d in summed), n)

    scale, zero = matrix(w.scale), None if w.zero is None else matrix(w.zero)
    given = {"group": w.group, "preferred": jnp.float32, "precision": how.precision}
    if w.block is None:
        y = scaled_dot(rows, matrix(w.codes), scale, zero, **given)
    else:
        y = planar_dot(rows, matrix(w.codes), scale, zero, bits=w.bits, block=w.block, **given)
    return y.reshape(*lead, *middle, *(w.shape[d] for d in free)).astype(how.dtype)


def _scale_activation(x: jax.Array, w: QuantizedArray, how: Product) -> jax.Array:
    """``x`` times a scale that is constant along everything but summed and batch axes."""
    axes = (*how.batch[1], *how.contract[1])
    places = (*how.batch[0], *how.contract[0])
    rest = [d for d in range(w.ndim) if d not in axes]
    factor = jnp.transpose(w.scale, (*axes, *rest)).reshape([w.scale.shape[d] for d in axes])
    # The factor's axes, in the order that x has them, and size 1 for the others.
    factor = jnp.transpose(factor, sorted(range(len(places)), key=places.__getitem__))
    return (x * jnp.expand_dims(factor, [d for d in range(x.ndim) if d not in places])).astype(
        x.dtype
    )


def _activation_sums(x: jax.Array, ndim: int, how: Product, dtype: Any) -> jax.Array:
    """``x`` summed over what the product sums over: what it gains per unit of a zero point."""
    kept = [d for d in range(x.ndim) if d not in how.contract[0]]
    order = (*how.batch[0], *(d for d in kept if d not in how.batch[0]))
    sums = jnp.transpose(x.astype(dtype).sum(how.contract[0]), [kept.index(d) for d in order])
    return jnp.expand_dims(sums, tuple(range(sums.ndim, ndim)))


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
    # The stack of the factors has to be the batch of the product: left axes follow it, of size 1.
    v = w.v.shape
    if stack >= cut or v[:stack] != w.shape[:stack] or any(n != 1 for n in v[stack : cut - 1]):
        return NotImplemented
    first, second, other = w.u, w.v, cut - 1
    if summed == right:
        first, second, other = w.v, w.u, ndim - 1
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
        (tuple(range(stack)), batch),
        how.dtype,
        how.precision,
    )
    y = contract(thin, second, back)
    if y is NotImplemented:
        return NotImplemented
    kept = [d for d in range(stack, ndim) if d not in summed]
    return y.reshape(*lead, *free_x, *(w.shape[d] for d in kept))


def _contract_joined(x: jax.Array, w: Joined, how: Product) -> Any:
    """A sum over the parts where they are summed over, otherwise their products end to end."""
    (x_summed, summed), (x_batch, batch) = how.contract, how.batch
    axis = w.ndim + w.axis
    met = dict(zip((*summed, *batch), (*x_summed, *x_batch), strict=True)).get(axis)
    wide = (
        how if axis not in summed else how._replace(dtype=jnp.promote_types(how.dtype, "float32"))
    )
    results = []
    for part, bounds in zip(w.parts, w.bounds(), strict=True):
        y = contract(x if met is None else cut(x, {met: bounds}), part, wide)
        results.append(
            contract(x, dense_operand(part, x.dtype), wide) if y is NotImplemented else y
        )
    if axis in summed:
        return sum(results[1:], results[0]).astype(how.dtype)
    free = [d for d in range(w.ndim) if d not in summed and d not in batch]
    if axis in batch:
        return jnp.concatenate(results, batch.index(axis))
    return jnp.concatenate(results, results[0].ndim - len(free) + free.index(axis))


@contraction_rule("dot_general", *STORED)
def _dot_general(call: Call, at: int, values: Sequence[Any]) -> Any:
    ((lhs, rhs), (lhs_batch, rhs_batch)) = call.params["dimension_numbers"]
    x, w = values[1 - at], values[at]
    pair = lambda left, right: (tuple(left), tuple(right))
    order = pair if at == 1 else lambda left, right: pair(right, left)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return NotImplemented
    given = call.out.dtype, call.params["precision"]
    how = Product(order(lhs, rhs), order(lhs_batch, rhs_batch), *given)
    y = contract(x, w, how)
    if y is NotImplemented or at == 1:
        return y
    # The weight came first: its free axes go before those of the activation.
    stack, free = len(lhs_batch), len(w.shape) - len(lhs) - len(lhs_batch)
    first = y.ndim - free
    return jnp.transpose(y, (*range(stack), *range(first, y.ndim), *range(stack, first)))


@contraction_rule("ragged_dot_general ragged_dot", *STORED)
def _ragged_dot(call: Call, at: int, values: Sequence[Any]) -> Any:
    """Products with one weight per group of rows take codes as an operand, the scale fused."""
    if at != 1:
        return NotImplemented
    x, w, *rest = values
    factored = isinstance(w, LowRankArray) and w.ndim == 3 and w.out_ndim == 1
    for factor in (w.u, w.v) if factored else (w,):
        operands = (x, dense_operand(factor, x.dtype), *rest)
        x = call.eqn.primitive.bind(*operands, **call.params)
    return x
