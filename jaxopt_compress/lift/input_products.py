"""Products of quantized activations with a weight.

The activation is rounded where it meets the weight: by one step per row, found at run time, or by
one that was calibrated or learned. Integers meet integers in a product of codes, summed exactly in
int32; other formats meet as the levels that their codes stand for. Steps multiply the result, and
an offset of the activation adds itself times the sum of the weights.
Derivatives are straight-through, to the activation, the weight's floating fields and the step.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import (
    FakeQuantizedArray,
    InputQuantizedArray,
    LowRankArray,
    QuantizedArray,
    is_compressed,
    materialize,
)
from jaxopt_compress.kernels import trained_dot
from jaxopt_compress.lift.activation_grids import (
    input_levels,
    input_step,
    residuals,
    rounded_input,
)
from jaxopt_compress.lift.coded_products import (
    are_float8,
    contract_float8,
    contract_integers,
    integer_weight,
    steps_leave,
)
from jaxopt_compress.lift.convolutions import bind_conv, bind_integer_conv
from jaxopt_compress.lift.cotangents import (
    differentiated,
    meets_integers,
    through_integers,
    through_product,
)
from jaxopt_compress.lift.interpreter import Call, Layer, leaf_rule, replay_equation
from jaxopt_compress.lift.products import (
    Place,
    Product,
    aligned,
    axis_names,
    contract,
    contraction_rule,
    dense_operand,
    dot,
    short_sums,
)
from jaxopt_compress.numerics.formats import Format
from jaxopt_compress.numerics.rounding import promoted
from jaxopt_compress.typing import Value


@contract.register
def _contract_quantized_input(w: InputQuantizedArray, x: jax.Array, how: Product) -> Value:
    if isinstance(w.weight, LowRankArray):
        return NotImplemented

    of_x, of_w, _ = axis_names(x.ndim, len(w.shape), how)
    spread = lambda field: aligned(field, of_w, of_x)
    layer = how.place and how.place.layer

    def run(w: InputQuantizedArray, x: jax.Array, layer: Layer | None) -> jax.Array:
        return _rounded_product(w, x, layer, how)

    def factors(w: InputQuantizedArray, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return residuals(w, x, lambda: input_step(w, x, how.contract[0], spread), spread)

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return trained_dot(x, w, (how.contract, how.batch), how.precision, how.dtype)

    def through(
        w: InputQuantizedArray, x: jax.Array, g: jax.Array, back: Format
    ) -> tuple[jax.Array, jax.Array]:
        weight = integer_weight(stored_weight(w.weight), w.fmt)
        if weight is not None and w.offset is None and meets_integers(weight, how, back):
            step = input_step(w, x, how.contract[0], spread)
            codes = input_levels(w, x, step, spread).astype(jnp.int8)
            return through_integers(weight, codes, step, g, how, back)
        first, last = len(how.batch[0]), x.ndim - len(how.contract[0])
        axes = range(last, g.ndim), range(first, last)
        return through_product(product, *factors(w, x), g, axes, back)

    return differentiated(run, product, factors, through, w, x, layer)


def _rounded_product(
    w: InputQuantizedArray, x: jax.Array, layer: Layer | None, how: Product
) -> jax.Array:
    """Both operands' codes multiplied where there is a product for them, and scaled behind it."""
    if w.format is None:
        return dot(x, dense_operand(w.weight, x.dtype), how)
    of_x, of_w, of_y = axis_names(x.ndim, len(w.shape), how)
    spread = lambda field: aligned(field, of_w, of_x)
    step = input_step(w, x, how.contract[0], spread)
    place = layer and Place(w, layer)
    wide = how._replace(dtype=promoted(how.dtype, jnp.float32), place=place)
    held = stored_weight(w.weight)
    weight = integer_weight(held, w.fmt)
    if weight is not None and weight.zero is None and held.tile is None:
        if held.scale.dtype == jnp.bfloat16:  # The product widens it.
            weight = weight.replace(scale=held.scale)
    sums = short_sums(how.dtype)

    def product(levels: jax.Array, step: jax.Array) -> jax.Array:
        """The product of ``levels * step``, which has size 1 where it sums."""
        # Words of codes would be unpacked before an integer product; a kernel reads them.
        words = how.pallas and isinstance(held, QuantizedArray) and held.block is not None
        if weight is not None and steps_leave(weight, how) and not words:
            return contract_integers(weight, levels.astype(jnp.int8), step, wide, sums)
        if are_float8(held, w.fmt) and steps_leave(held, how):
            y = contract_float8(held, levels.astype(w.fmt.dtype), wide, sums)
        else:
            y = contract(held, levels.astype(x.dtype), wide)
        return y * aligned(step, of_x, of_y)

    y = product(input_levels(w, x, step, spread), step)
    if w.offset is not None:
        kept = (*how.contract[0], *how.batch[0])
        row = jnp.ones([n if d in kept else 1 for d, n in enumerate(x.shape)], jnp.float32)
        y = y + product(row, spread(w.offset))
    return y.astype(how.dtype)


def stored_weight(w: Value) -> Value:
    """The weight as it is stored: of values that are rounded in training, the codes."""
    return w.quantized() if isinstance(w, FakeQuantizedArray) else w


@contraction_rule("conv_general_dilated", InputQuantizedArray)
def _conv(call: Call, at: int, values: Sequence[Value]) -> Value:
    """Activations share a step per example, or one step."""
    if at != 1:
        return NotImplemented
    spec = call.params["dimension_numbers"]
    batch, out_axis = spec.lhs_spec[0], spec.rhs_spec[0]

    joint = call.params["batch_group_count"]
    spread = lambda field: field.reshape([1] * call.out.ndim)

    def step_for(w: InputQuantizedArray, x: jax.Array) -> jax.Array:
        axes = [d for d in range(x.ndim) if d != batch or joint > 1]
        return input_step(w, x, axes, spread)

    def run(w: InputQuantizedArray, x: jax.Array) -> jax.Array:
        if w.format is None:
            return bind_conv(call, x, dense_operand(w.weight, x.dtype), call.out.dtype)
        step, weight = step_for(w, x), integer_weight(stored_weight(w.weight), w.fmt)

        def product(levels: jax.Array) -> jax.Array:
            if (
                weight is None
                or weight.zero is not None
                or weight.group_size is not None
                or any(weight.scale.shape[d] > 1 for d in spec.rhs_spec[1:])
            ):
                dense = dense_operand(w.weight, x.dtype)
                return bind_conv(call, levels.astype(x.dtype), dense, jnp.float32)
            codes = levels.astype(jnp.int8), weight.codes.astype(jnp.int8)
            shape = [1] * x.ndim
            shape[spec.out_spec[1]] = weight.scale.shape[out_axis]
            y = bind_integer_conv(call, *codes).astype(jnp.float32)
            return y * weight.scale.reshape(shape)

        # A step per example stands at the batch axis of the result.
        y = product(input_levels(w, x, step, spread)) * jnp.moveaxis(step, batch, spec.out_spec[0])
        if w.offset is not None:
            # Entries beyond the border are 0, not the offset: sums along the border differ.
            ones = jnp.ones([joint if d == batch else n for d, n in enumerate(x.shape)])
            y = y + product(ones) * spread(w.offset)
        return y.astype(call.out.dtype)

    def factors(w: InputQuantizedArray, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return residuals(w, x, lambda: step_for(w, x), spread)

    product = lambda x, w: bind_conv(call, x, w, call.out.dtype)
    x, w = values

    def through(
        w: InputQuantizedArray, x: jax.Array, g: jax.Array, back: Format
    ) -> tuple[jax.Array, jax.Array]:
        example, channel = spec.out_spec[:2]
        rest = lambda axis: [d for d in range(g.ndim) if d != axis or joint > 1]
        axes = rest(example), rest(channel)
        return through_product(product, *factors(w, x), g, axes, back)

    return differentiated(run, product, factors, through, w, x)


@leaf_rule("gather", InputQuantizedArray)
def _gather(call: Call, at: int) -> Value:
    """A lookup has no activation to round."""
    ref, operands = call.operands[at], list(call.operands)
    weight = ref.array.weight
    weight = materialize(weight) if isinstance(weight, FakeQuantizedArray) else weight
    operands[at] = ref.replace(weight) if is_compressed(weight) else weight
    return replay_equation(call._replace(operands=operands))


@contraction_rule("ragged_dot_general ragged_dot", InputQuantizedArray)
def _ragged_dot(call: Call, at: int, values: Sequence[Value]) -> Value:
    """Rows are rounded, and meet the dense weight."""
    x, w, *rest = values
    if at != 1 or w.scale is not None:
        return NotImplemented

    step = lambda w, x: input_step(w, x, (x.ndim - 1,), None)
    factors = lambda w, x: residuals(w, x, lambda: step(w, x), None)
    product = lambda x, w: call.eqn.primitive.bind(x, w, *rest, **call.params)

    def run(w: InputQuantizedArray, x: jax.Array) -> jax.Array:
        if w.format is None:
            return product(x, dense_operand(w.weight, x.dtype))
        rows = rounded_input(w, x, step(w, x), None)
        return product(rows, dense_operand(w.weight, x.dtype))

    def through(
        w: InputQuantizedArray, x: jax.Array, g: jax.Array, back: Format
    ) -> tuple[jax.Array, jax.Array]:
        return through_product(product, *factors(w, x), g, ((1,), (0,)), back)

    return differentiated(run, product, factors, through, w, x)
