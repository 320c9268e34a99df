"""Which operations are meetings of a parameter and an activation."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from jaxopt_compress.lift import _compat
from jaxopt_compress.lift.activations import patches_of, rows_of, rows_of_groups
from jaxopt_compress.lift.interpreter import Call, Ref, leaf_rule
from jaxopt_compress.lift.observe.entries import looked_up
from jaxopt_compress.lift.observe.meetings import Operation, announce
from jaxopt_compress.lift.observe.probe import Axes, Axis, Probe
from jaxopt_compress.typing import Value


def _is_activation(x: Ref, other: Value) -> bool:
    """Whether a value computed from parameters is the activation that a weight meets.

    So is an embedding that was looked up, or added to an activation.
    """
    plain = lambda probe: not any(m.mixed or m.looked_up for m in probe.members)
    return isinstance(other, Ref) and plain(other.array) and not plain(x.array)


def _value(x: Value) -> Value:
    return x.array.materialize() if isinstance(x, Ref) else x


def _bind(call: Call) -> Value:
    return _compat.bind(call.eqn, [_value(x) for x in call.operands])[0]


@leaf_rule("dot_general", Probe)
def _dot_general(call: Call, at: int) -> Value:
    contract, batch = call.params["dimension_numbers"]
    result = _bind(call)
    for side, x in enumerate(call.operands):
        if isinstance(x, Ref) and not _is_activation(x, call.operands[1 - side]):
            other = _value(call.operands[1 - side])
            summed, shared = tuple(contract[1 - side]), tuple(batch[1 - side])
            free = (n for d, n in enumerate(other.shape) if d not in summed + shared)
            order = lambda x=other, shared=shared, summed=summed: rows_of(x, shared, summed)
            axes = tuple(contract[side]), tuple(batch[side]), ()
            own = [d for d in range(len(x.array.shape)) if d not in axes[0] + axes[1]]
            # Results have the shared axes, then the others of the left and of the right operand.
            first = len(shared) if side == 0 else len(result.shape) - len(own)
            outputs = {d: i for i, d in enumerate(axes[1])}
            outputs |= {d: first + i for i, d in enumerate(own)}
            rows = math.prod(free)
            met = Operation("dot_general", x.array, *axes, rows, other, order, outputs)
            announce(call, met, result)
    return result


@leaf_rule("ragged_dot_general ragged_dot", Probe)
def _ragged_dot(call: Call, at: int) -> Value:
    def met(w: Probe, x: Value, result: Value) -> Operation:
        # rhs is [group, k, n]: each row of x meets the matrix of its group.
        rows = math.prod(x.shape[:-1]) / max(w.shape[0], 1)
        sizes = _value(call.operands[2])
        order = lambda: rows_of_groups(x, sizes)
        outputs = {2: len(result.shape) - 1}
        return Operation("ragged_dot_general", w, (1,), (0,), (), rows, x, order, outputs)

    return _meeting_of_rhs(call, met)


@leaf_rule("conv_general_dilated", Probe)
def _conv(call: Call, at: int) -> Value:
    def met(w: Probe, x: Value, result: Value) -> Operation:
        spec = call.params["dimension_numbers"]
        summed, window = tuple(sorted(spec.rhs_spec[1:])), tuple(spec.rhs_spec[2:])
        rows = math.prod(n for d, n in enumerate(result.shape) if d != spec.out_spec[1])
        order = lambda: patches_of(call, x, w.shape)
        outputs = {spec.rhs_spec[0]: spec.out_spec[1]}
        name = "conv_general_dilated"
        return Operation(name, w, summed, (), (), rows, x, order, outputs, window)

    return _meeting_of_rhs(call, met)


def _meeting_of_rhs(call: Call, met: Callable[[Probe, Value, Value], Operation]) -> Value:
    """Runs an operation whose weight is the right operand, and announces it if that is a parameter.

    Args:
        call: The operation.
        met: ``met(weight, activation, result)`` describes it.
    """
    result, rhs = _bind(call), call.operands[1]
    if isinstance(rhs, Ref):
        announce(call, met(rhs.array, _value(call.operands[0]), result), result)
    return result


@leaf_rule("gather", Probe)
def _gather(call: Call, at: int) -> Value:
    """A lookup. Whole matrices that it finds, such as experts, are followed on to products."""
    result = _bind(call)
    if at != 0:
        return result
    spec, w = call.params["dimension_numbers"], call.operands[0].array
    indices, sizes = _value(call.operands[1]), call.params["slice_sizes"]
    # An axis of which all is taken is not looked up, although there is an index for it.
    found = [d for d in spec.start_index_map if sizes[d] < w.shape[d]]
    shared = tuple(spec.operand_batching_dims)
    many = indices.size > indices.shape[-1]
    if many:
        rows = math.prod(n for d, n in enumerate(indices.shape[:-1]))
        gathered = Operation("gather", w, (), shared, tuple(found), rows, None, None, {})
        announce(call, gathered, result)
    gone = (*spec.collapsed_slice_dims, *shared)
    kept = [d for d in range(len(w.shape)) if d not in gone]
    matrix = sum(sizes[d] > 1 and d not in found for d in kept) >= 2
    if (many and not matrix) or any(sizes[d] > 1 for d in found):
        return result
    positions = [d for d in range(result.ndim) if d not in spec.offset_dims]

    def axes_of(axes: Axes) -> list[Axis]:
        new = [Axis()] * result.ndim
        for d, at in zip(kept, spec.offset_dims, strict=True):
            new[at] = axes[d]
        for d, i in zip(shared, spec.start_indices_batching_dims, strict=True):
            new[positions[i]] = axes[d]
        return new

    named = [spec.offset_dims[kept.index(d)] for d in kept if d in found]
    numbers = []
    for d in found:
        index = indices[..., spec.start_index_map.index(d)]
        index = jnp.clip(index, 0, w.shape[d] - 1)
        numbers.append(lax.broadcast_in_dim(index, result.shape, positions))
    before = w.entries
    if before is not None:
        others = [_value(x) for x in call.operands[1:]]
        before = _compat.bind(call.eqn, [before, *others])[0]
    return looked_up(w, result, axes_of, found, named, numbers, before)
