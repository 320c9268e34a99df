"""Convolutions on the stored form of a kernel."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxopt_compress.arrays import CodebookArray, LowRankArray, QuantizedArray, SparseArray
from jaxopt_compress.kernels import on_each_platform
from jaxopt_compress.kernels.integer_dots import exact_parts
from jaxopt_compress.lift.interpreter import Call
from jaxopt_compress.lift.products import contraction_rule, dense_operand, levels
from jaxopt_compress.lift.views import plain_steps
from jaxopt_compress.numerics.rounding import promoted
from jaxopt_compress.typing import Value

# Up to here XLA:CPU takes 3 to 8 times as long for integers as for float32, and above no longer.
_FEW_CHANNELS = 16


@contraction_rule("conv_general_dilated", QuantizedArray, SparseArray, CodebookArray)
def _conv(call: Call, at: int, values: Sequence[Value]) -> Value:
    """The scale of an output channel multiplies the result; any other one the codes."""
    if at != 1:
        return NotImplemented
    x, w = values
    w = plain_steps(w) if isinstance(w, QuantizedArray) else w
    spec = call.params["dimension_numbers"]
    out_axis = spec.rhs_spec[0]
    wide = promoted(call.out.dtype, jnp.float32)
    per_channel = isinstance(w, QuantizedArray) and w.group_size is None
    if not per_channel or any(w.scale.shape[d] > 1 for d in spec.rhs_spec[1:]):
        return bind_conv(call, x, dense_operand(w, x.dtype), call.out.dtype)
    if w.bits > 8:
        x = x.astype(wide)
    y = bind_conv(call, x, levels(w, x.dtype).astype(x.dtype), wide)
    shape = [1] * y.ndim
    shape[spec.out_spec[1]] = w.scale.shape[out_axis]
    return (y * w.scale.reshape(shape)).astype(call.out.dtype)


def bind_conv(
    call: Call,
    x: jax.Array,
    w: jax.Array,
    dtype: DTypeLike,
    batch_groups: int | None = None,
    groups: int | None = None,
) -> jax.Array:
    """The convolution of dense operands, with a result of another dtype, and other groups."""
    given = call.params
    return lax.conv_general_dilated(
        x,
        w,
        given["window_strides"],
        given["padding"],
        given["lhs_dilation"],
        given["rhs_dilation"],
        given["dimension_numbers"],
        given["feature_group_count"] if groups is None else groups,
        given["batch_group_count"] if batch_groups is None else batch_groups,
        given["precision"],
        dtype,
    )


def bind_integer_conv(call: Call, x: jax.Array, w: jax.Array) -> jax.Array:
    """The convolution of int8 codes, summed in int32; by parts in float32 if that is too short."""
    given, spec = call.params, call.params["dimension_numbers"]
    plain = lambda x, w: bind_conv(call, x, w, jnp.int32)
    outputs, inputs = (w.shape[d] for d in spec.rhs_spec[:2])
    patch = [1 if d == spec.rhs_spec[0] else n for d, n in enumerate(w.shape)]
    if (parts := exact_parts(math.prod(patch), x.dtype, w.dtype)) > 1:
        # Cut by zeros: of groups and windows, no axis of its own may be left to cut.
        part = jnp.arange(math.prod(patch)).reshape(patch) % parts
        sums = [plain(x, jnp.where(part == i, w, 0)).astype(jnp.float32) for i in range(parts)]
        return functools.reduce(jnp.add, sums)
    grouped = given["feature_group_count"] > 1 or given["batch_group_count"] > 1
    if grouped or outputs > _FEW_CHANNELS or not 4 <= inputs <= _FEW_CHANNELS:
        return plain(x, w)

    def padded(x: jax.Array, w: jax.Array) -> jax.Array:
        more = 2 * _FEW_CHANNELS - outputs
        w = jnp.pad(w, [(0, more if d == spec.rhs_spec[0] else 0) for d in range(w.ndim)])
        return lax.slice_in_dim(plain(x, w), 0, outputs, axis=spec.out_spec[1])

    return on_each_platform({"cpu": padded}, plain, x, w)


@contraction_rule("conv_general_dilated", LowRankArray)
def _conv_low_rank(call: Call, at: int, values: Sequence[Value]) -> Value:
    """A convolution to ``rank`` channels per group, then one of size 1 to the outputs."""
    params, spec = call.params, call.params["dimension_numbers"]
    if at != 1:
        return NotImplemented
    (x, w), out_axis = values, spec.rhs_spec[0]
    last = w.ndim - 1
    first = out_axis == 0 and w.out_ndim == last
    if not first and (out_axis != last or w.out_ndim != 1):
        return NotImplemented
    # One of the two factors is a kernel, whose output channels are the rank.
    kernel, mix = (w.v, w.u) if first else (w.u, w.v)
    mix = dense_operand(mix, x.dtype).reshape(
        (w.shape[0], w.rank) if first else (w.rank, w.shape[last])
    )
    groups, channel = params["feature_group_count"], spec.out_spec[1]
    repeats = [groups if d == out_axis else 1 for d in range(w.ndim)]
    kernel = jnp.tile(dense_operand(kernel, x.dtype), repeats)
    thin = bind_conv(call, x, kernel, call.out.dtype, batch_groups=1)
    mix = mix.T if first else mix
    if (parts := params["batch_group_count"]) > 1:
        return _mixed_by_parts(call, thin, mix, parts)
    thin = jnp.moveaxis(thin, channel, -1)
    thin = thin.reshape(*thin.shape[:-1], groups, w.rank)
    mix = mix.reshape(w.rank, groups, -1)
    y = jnp.einsum("...gr,rgn->...gn", thin, mix.astype(thin.dtype), precision=params["precision"])
    y = y.reshape(*y.shape[:-2], w.shape[out_axis])
    return jnp.moveaxis(y, -1, channel).astype(call.out.dtype)


def _mixed_by_parts(call: Call, thin: jax.Array, mix: jax.Array, parts: int) -> jax.Array:
    """Outputs of which each part of the channels meets its own part of the batch."""
    batch, channel = call.params["dimension_numbers"].out_spec[:2]
    thin = jnp.moveaxis(thin, (batch, channel), (0, -1))
    thin = thin.reshape(parts, -1, *thin.shape[1:])
    mix = mix.reshape(mix.shape[0], parts, -1).astype(thin.dtype)
    y = jnp.einsum("pb...r,rpn->b...pn", thin, mix, precision=call.params["precision"])
    y = y.reshape(*y.shape[:-2], -1)
    return jnp.moveaxis(y, (0, -1), (batch, channel)).astype(call.out.dtype)
