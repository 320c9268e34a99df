"""Products with weights whose inputs have factors: the activation is multiplied by them first."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import InputQuantizedArray, ScaledArray
from jaxopt_compress.lift.convolutions import bind_conv
from jaxopt_compress.lift.interpreter import Call, leaf_rule, replay_equation
from jaxopt_compress.lift.products import (
    Product,
    aligned,
    axis_names,
    contract,
    contraction_rule,
    dense_operand,
)
from jaxopt_compress.typing import Value


@contract.register
def _contract_scaled(w: ScaledArray, x: jax.Array, how: Product) -> Value:
    met = (*how.contract[1], *how.batch[1])
    if any(n > 1 and d not in met for d, n in enumerate(w.factors.shape)):
        return NotImplemented
    of_x, of_w, _ = axis_names(x.ndim, w.ndim, how)
    factors = aligned(w.factors, of_w, of_x)
    x = (x.astype(jnp.float32) * factors).astype(x.dtype)
    return contract(w.array, x, how._replace(place=None))


@contraction_rule("conv_general_dilated", ScaledArray)
def _conv(call: Call, at: int, values: Sequence[Value]) -> Value:
    """Factors of input channels multiply the activation, those of outputs the result.

    Factors that differ along a window are none of the activation: the kernel is decoded, unless
    activations are rounded, which have to be scaled before.
    """
    x, w = values
    if at != 1:
        return NotImplemented
    spec, groups = call.params["dimension_numbers"], call.params["feature_group_count"]
    factors = jnp.transpose(w.factors, spec.rhs_spec)
    outputs, inputs, *window = factors.shape
    by_input = outputs in (1, groups) and all(n == 1 for n in window)
    if by_input:
        channels = w.shape[spec.rhs_spec[1]]
        factors = jnp.broadcast_to(factors.reshape(outputs, inputs), (groups, channels))
        x = _along(x, factors.reshape(-1), spec.lhs_spec[1])
    elif isinstance(w.array, InputQuantizedArray):
        return NotImplemented
    elif inputs != 1 or any(n != 1 for n in window):
        return bind_conv(call, x, dense_operand(w, x.dtype), call.out.dtype)
    inner = [x, call.operands[1].replace(w.array)]
    [y] = replay_equation(call._replace(operands=inner))
    return y if by_input else _along(y, factors.reshape(-1), spec.out_spec[1])


def _along(x: jax.Array, factors: jax.Array, axis: int) -> jax.Array:
    shape = [-1 if d == axis else 1 for d in range(x.ndim)]
    return (x.astype(jnp.float32) * factors.reshape(shape)).astype(x.dtype)


@leaf_rule("gather", ScaledArray)
def _gather(call: Call, at: int) -> Value:
    """Rows of the array, and of the factors where they differ from row to row."""
    w, given = call.operands[at].array, call.params
    looked_up = given["dimension_numbers"].start_index_map
    if at != 0 or any(w.factors.shape[d] > 1 for d in looked_up):
        return NotImplemented
    whole = all(given["slice_sizes"][d] == w.shape[d] for d in range(w.ndim) if d not in looked_up)
    parts = any(n not in (1, m) for n, m in zip(w.factors.shape, w.shape, strict=True))
    if parts or not whole or given["fill_value"] is not None:
        return NotImplemented
    inner = [call.operands[0].replace(w.array), *call.operands[1:]]
    [y] = replay_equation(call._replace(operands=inner))
    spec = given["dimension_numbers"]
    gone = (*spec.collapsed_slice_dims, *spec.operand_batching_dims)
    kept = [d for d in range(w.ndim) if d not in gone]
    shape = [1] * y.ndim
    for place, d in zip(spec.offset_dims, kept, strict=True):
        shape[place] = w.factors.shape[d]
    factors = w.factors.transpose([*gone, *kept]).reshape(shape)
    return (y.astype(jnp.float32) * factors).astype(y.dtype)
