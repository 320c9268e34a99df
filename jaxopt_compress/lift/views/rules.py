"""The primitives that are views of a compressed array."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxopt_compress.arrays import (
    CodebookArray,
    InputQuantizedArray,
    LowRankArray,
    PermutedArray,
    QuantizedArray,
    RotatedArray,
    ScaledArray,
    SparseArray,
    SumArray,
    TensorTrainArray,
)
from jaxopt_compress.lift import _compat
from jaxopt_compress.lift.interpreter import Call, Layer, Ref, Turned, leaf_rule
from jaxopt_compress.lift.views import (
    base,
    codebook,
    low_rank,
    permuted,
    quantized,
    rotated_inputs,
    scaled_inputs,
    sparse,
    summed,
    tensor_train,
    wrapped,
)
from jaxopt_compress.lift.views.base import Cut, NoView
from jaxopt_compress.lift.views.joined import Joined
from jaxopt_compress.lift.views.mapped import Mapped
from jaxopt_compress.typing import Value

STORED = (
    QuantizedArray,
    SparseArray,
    LowRankArray,
    PermutedArray,
    Joined,
    InputQuantizedArray,
    ScaledArray,
    RotatedArray,
    SumArray,
    TensorTrainArray,
    CodebookArray,
)

del (
    codebook,
    low_rank,
    permuted,
    quantized,
    rotated_inputs,
    scaled_inputs,
    sparse,
    summed,
    tensor_train,
    wrapped,
)  # imported for the views they register


ViewRule = Callable[[Call, Value], Value]


def _view(primitives: str) -> Callable[[ViewRule], ViewRule]:
    """Registers ``rule(call, array)`` for primitives of which the first operand is looked at."""

    def register(rule):
        @leaf_rule(primitives, *STORED)
        def _(call: Call, at: int) -> Value:
            try:
                return rule(call, call.operands[at].array) if at == 0 else NotImplemented
            except NoView:
                return NotImplemented

        return rule

    return register


@_view("transpose")
def _transpose(call: Call, array: Value) -> Value:
    ref, order = call.operands[0], tuple(call.params["permutation"])
    view = base.transposed(array, order)
    if not call.replay.pallas:
        return view
    lying = ref.turned or Turned(array, ref.layer, tuple(range(array.ndim)))
    order = tuple(lying.order[d] for d in order)
    return Ref(view, ref.path, turned=lying._replace(order=order))


@_view("squeeze")
def _squeeze(call: Call, array: Value) -> Value:
    return _reshaped(call)


@_view("reshape")
def _reshape(call: Call, array: Value) -> Value:
    if call.params["dimensions"] is not None:
        return NotImplemented
    return _reshaped(call)


@_view("broadcast_in_dim")
def _broadcast(call: Call, array: Value) -> Value:
    """New axes of size 1 only: anything else would copy codes."""
    if array.size != call.out.size:
        return NotImplemented
    return _reshaped(call)


def _reshaped(call: Call) -> Value:
    """The value, and the stack that it is a layer of, in another shape."""
    ref, shape = call.operands[0], tuple(call.out.shape)
    array, layer = base.reshaped(ref.array, shape), ref.layer
    return array if layer is None else _in_stack(ref, array, layer.stack, layer.index)


def _in_stack(ref: Ref, array: Value, stack: Value, index: Value) -> Value:
    """A view of ``ref`` that is layer ``index`` of ``stack``, if that can be seen in its shape."""
    length = stack.shape[0]
    try:
        stack = base.reshaped(stack, (length, *array.shape))
    except NoView:
        return array
    pairs = zip(jax.tree.leaves(stack), jax.tree.leaves(array), strict=True)
    if any(all_.shape not in ((length, *own.shape), (1, *own.shape)) for all_, own in pairs):
        return array
    return Ref(array, ref.path, Layer(stack, jnp.asarray(index, jnp.int32)))


def _cut(call: Call, cuts: dict[int, Cut]) -> Value:
    """Part of a value; one entry of a stack knows its place there."""
    ref = call.operands[0]
    array = base.cut(ref.array, cuts)
    if not call.replay.pallas or ref.layer is not None or list(cuts) != [0] or cuts[0].size > 1:
        return array
    # As `jax.lax.dynamic_slice` does.
    start = jnp.clip(cuts[0].start, 0, ref.array.shape[0] - 1)
    return _in_stack(ref, array, ref.array, start)


@_view("slice")
def _slice(call: Call, array: Value) -> Value:
    starts, limits = call.params["start_indices"], call.params["limit_indices"]
    strides = call.params["strides"] or (1,) * array.ndim
    cuts = {
        d: Cut(start, limit - start, stride)
        for d, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True))
        if (start, limit, stride) != (0, array.shape[d], 1)
    }
    return _cut(call, cuts)


@_view("dynamic_slice")
def _dynamic_slice(call: Call, array: Value) -> Value:
    pairs = zip(call.dense(0)[1:], call.params["slice_sizes"], strict=False)
    cuts = {d: Cut(s, n) for d, (s, n) in enumerate(pairs) if n != array.shape[d]}
    return _cut(call, cuts)


@_view("split")
def _split(call: Call, array: Value) -> Value:
    axis, sizes = call.params["axis"], call.params["sizes"]
    starts = itertools.accumulate(sizes, initial=0)
    return [base.cut(array, {axis: Cut(s, n)}) for s, n in zip(starts, sizes, strict=False)]


@_view("rev")
def _reverse(call: Call, array: Value) -> Value:
    return base.flipped(array, call.params["dimensions"])


@_view("convert_element_type")
def _convert(call: Call, array: Value) -> Value:
    dtype = call.params["new_dtype"]
    return base.cast(array, dtype) if jnp.issubdtype(dtype, jnp.floating) else NotImplemented


@_view("copy copy_p pvary pcast name")
def _as_is(call: Call, array: Value) -> Value:
    return array


@_view("stop_gradient")
def _stop_gradient(call: Call, array: Value) -> Value:
    return jax.tree.map(lambda x: lax.stop_gradient(x), array)


@leaf_rule("optimization_barrier", *STORED)
def _barrier(call: Call, at: int) -> Value:
    return lax.optimization_barrier(call.operands)


@_view("sharding_constraint reshard")
def _constrain(call: Call, array: Value) -> Value:
    sharding = call.params.get("sharding", call.params.get("dst_sharding"))
    if not isinstance(sharding, NamedSharding):
        return array
    try:
        specs = array.specs(sharding.spec)
    except ValueError:
        return NotImplemented
    move = call.eqn.primitive.name == "reshard"
    pin = jax.sharding.reshard if move else lax.with_sharding_constraint
    place = lambda spec, x: pin(x, NamedSharding(sharding.mesh, spec))
    return jax.tree.map(place, specs, array, is_leaf=lambda s: isinstance(s, PartitionSpec))


@_view("neg")
def _negative(call: Call, array: Value) -> Value:
    return base.scaled(array, -1.0)


@leaf_rule("mul", *STORED)
def _multiply(call: Call, at: int) -> Value:
    """Numbers are factors of the scale, of the values or of one of the factors."""
    first, other = call.operands[at], call.operands[1 - at]
    if isinstance(other, Ref):
        return Mapped(first.array, call.eqn) if first.array is other.array else NotImplemented
    try:
        return _times(first.array, other)
    except NoView:
        return NotImplemented


@_view("div")
def _divide(call: Call, array: Value) -> Value:
    other = call.operands[1]
    if isinstance(other, Ref):
        return NotImplemented
    return _times(array, 1 / jnp.asarray(other, jnp.float32))


def _times(array: Value, factor: Value) -> Value:
    return (
        base.rescaled(array, factor) if getattr(factor, "ndim", 0) else base.scaled(array, factor)
    )


@leaf_rule("integer_pow square abs", *STORED)
def _function(call: Call, at: int) -> Value:
    return Mapped(call.operands[at].array, call.eqn)


@leaf_rule("reduce_sum reduce_max reduce_min", *STORED, Mapped)
def _reduce(call: Call, at: int) -> Value:
    return _compat.bind(call.eqn, [call.operands[at].array.materialize()])[0]


@leaf_rule("concatenate", *STORED)
def _concatenate(call: Call, at: int) -> Value:
    parts = tuple(x.array if isinstance(x, Ref) else x for x in call.operands)
    flat = [q for p in parts for q in (p.parts if _same_axis(p, call) else (p,))]
    return Joined(tuple(flat), call.params["dimension"] - call.out.ndim)


def _same_axis(part: Value, call: Call) -> bool:
    return isinstance(part, Joined) and part.axis == call.params["dimension"] - call.out.ndim
