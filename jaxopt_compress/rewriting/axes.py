"""Which axis of an operand each axis of a result is, and what products do to channels."""

import math
from typing import Any, NamedTuple

from jax import numpy as jnp

from jaxopt_compress.rewriting.staging import Step

_SAME = {"convert_element_type", "copy", "reduce_precision", "sharding_constraint", "name"}
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min"}


class Product(NamedTuple):
    """A product with a weight.

    Attributes:
        data: The position of the other operand.
        contracted: The data's axis -> the weight's axis of the same channels.
        free: The weight's axis of output channels; None if there is not exactly one.
        out: The same axis of the result.
        problem: Why the input channels have no axis of their own in the weight, or None.
    """

    data: int
    contracted: dict[int, int]
    free: int | None
    out: int
    problem: str | None = None


def shape_of(step: Step, i: int) -> tuple[int, ...]:
    """The shape of an operand."""
    aval: Any = step.eqn.invars[i].aval
    return tuple(aval.shape)


def moved(step: Step) -> list[int | None] | None:
    """The operand's axis for each axis of the result; None if it is no change of shape."""
    name, params, old = step.eqn.primitive.name, step.eqn.params, shape_of(step, 0)
    rank = len(step.out.shape)
    if name in _SAME:
        floats = jnp.issubdtype(step.out.dtype, jnp.floating)
        return list(range(rank)) if floats else None
    if name == "transpose":
        return list(params["permutation"])
    if name == "broadcast_in_dim":
        at = {k: i for i, k in enumerate(params["broadcast_dimensions"])}
        new = step.out.shape
        return [at[k] if k in at and old[at[k]] == new[k] else None for k in range(rank)]
    if name in ("squeeze", "expand_dims"):
        kept = set(params["dimensions"])
        if name == "squeeze":
            return [i for i in range(len(old)) if i not in {k % len(old) for k in kept}]
        rest = iter(range(len(old)))
        return [None if k in kept else next(rest) for k in range(rank)]
    if name == "reshape":
        return _reshaped(old, tuple(step.out.shape))
    return None


def _reshaped(old: tuple[int, ...], new: tuple[int, ...]) -> list[int | None]:
    before = {(math.prod(old[:i]), n): i for i, n in enumerate(old) if n > 1}
    return [before.get((math.prod(new[:k]), n)) for k, n in enumerate(new)]


def merged(step: Step, axis: int) -> tuple[int, int] | None:
    """Where a reshape merges an axis with others: the axis of the result, and a number ``m``.

    Index ``i`` of the result's axis was index ``i // m % size`` of the operand's.
    """
    if step.eqn.primitive.name != "reshape":
        return None
    old, new = shape_of(step, 0), tuple(step.out.shape)
    stride = math.prod(old[axis + 1 :])
    for k, size in enumerate(new):
        inner = math.prod(new[k + 1 :])
        if size > 1 and stride % inner == 0 and (inner * size) % (stride * old[axis]) == 0:
            return k, stride // inner
    return None


def pooled(step: Step) -> list[int | None] | None:
    """`moved` for reductions and pooling; axes that were reduced or pooled do not appear."""
    name, params, rank = step.eqn.primitive.name, step.eqn.params, len(shape_of(step, 0))
    if name in _REDUCTIONS:
        return [i for i in range(rank) if i not in params["axes"]]
    if name in ("reduce_window_sum", "reduce_window_max", "reduce_window_min"):
        windows = (params["window_dimensions"], params["window_strides"], params["padding"])
        single = [x == (1, 1, (0, 0)) for x in zip(*windows, strict=True)]
        return [i if same else None for i, same in enumerate(single)]
    return None


def product(step: Step, weight: int) -> Product | None:
    """Reads a product whose operand ``weight`` is a parameter; None if it is no product."""
    name, params = step.eqn.primitive.name, step.eqn.params
    if name == "dot_general":
        contract, batch = params["dimension_numbers"]
        data, rank = 1 - weight, len(step.out.shape)
        taken = (*contract[weight], *batch[weight])
        free = [i for i in range(len(shape_of(step, weight))) if i not in taken]
        out = len(batch[0]) if weight == 0 else rank - 1
        pairs = dict(zip(contract[data], contract[weight], strict=True))
        one = free[0] if len(free) == 1 and not batch[weight] else None
        return Product(data, pairs, one, out, problem="has batch axes" if batch[0] else None)
    if name == "conv_general_dilated" and weight == 1 and params["batch_group_count"] == 1:
        numbers, groups = params["dimension_numbers"], params["feature_group_count"]
        inner, out = numbers.lhs_spec[1], numbers.out_spec[1]
        o, i = numbers.rhs_spec[:2]
        if groups == 1:
            return Product(0, {inner: i}, o, out)
        if groups == shape_of(step, 0)[inner] == shape_of(step, 1)[o]:
            return Product(0, {inner: o}, o, out)
        return Product(0, {inner: i}, o, out, problem="has groups of channels")
    return None
