"""Convolutions with kernels in three parts."""

from collections.abc import Sequence

import jax
from jax import lax

from jaxopt_compress.arrays import TuckerArray
from jaxopt_compress.lift.convolutions import bind_conv
from jaxopt_compress.lift.interpreter import Call
from jaxopt_compress.lift.products import contraction_rule, dense_operand
from jaxopt_compress.typing import Value


@contraction_rule("conv_general_dilated", TuckerArray)
def _conv(call: Call, at: int, values: Sequence[Value]) -> Value:
    """To the channels of the core, through its window, and to the outputs."""
    given, spec = call.params, call.params["dimension_numbers"]
    if at != 1 or given["feature_group_count"] > 1 or given["batch_group_count"] > 1:
        return NotImplemented
    x, w = values
    if tuple(w.ndim + d for d in w.axes) != (spec.rhs_spec[1], spec.rhs_spec[0]):
        return NotImplemented

    def mixed(x: jax.Array, kernel: Value, axes: tuple[int, ...]) -> jax.Array:
        """A convolution of size 1, of an array with its batch, channels and windows at ``axes``."""
        return lax.conv_general_dilated(
            x,
            dense_operand(kernel, x.dtype),
            (1,) * (w.ndim - 2),
            "VALID",
            dimension_numbers=lax.ConvDimensionNumbers(axes, spec.rhs_spec, axes),
            precision=given["precision"],
        )

    x = mixed(x, w.first, spec.lhs_spec)
    groups = w.ranks[0] if w.depthwise else None
    x = bind_conv(call, x, dense_operand(w.core, x.dtype), x.dtype, groups=groups)
    return mixed(x, w.last, spec.out_spec).astype(call.out.dtype)
