"""Uniform quantization of parameters, with straight-through gradients."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import LowRankArray, QuantizedArray, SparseArray
from jaxopt_compress.arrays.quantized import store_codes
from jaxopt_compress.compression import Compression, Decision, LeafMethod, Parameter, leafwise
from jaxopt_compress.numerics.formats import (
    Format,
    absmax_scale,
    decode,
    encode,
    format_of,
    round_to_grid,
)
from jaxopt_compress.numerics.groups import range_of, spread
from jaxopt_compress.numerics.packing import pack
from jaxopt_compress.tree import Layout, Where


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "zero"],
    meta_fields=["format", "reduce", "axis", "group", "block"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedState:
    """The grid of one parameter.

    Attributes:
        scale: Float32 steps.
        zero: Integer zero points, or None if symmetric.
        format: The number format.
        reduce: Negative axes that share a step.
        axis: The negative axis along which codes are grouped and packed, or None for a scalar.
        group: Entries per group, or None.
        block: Entries per block of packed words, or None.
    """

    scale: Any
    zero: Any
    format: Format
    reduce: tuple[int, ...]
    axis: int | None
    group: int | None
    block: int | None
    kind = "quantize"
    replaces = False

    def _grid(self) -> tuple[jax.Array, jax.Array | None]:
        if self.group is None or self.axis is None:
            return self.scale, self.zero
        axis, group = self.axis, self.group
        wide = lambda x: None if x is None else spread(x, axis, group)
        return spread(self.scale, axis, group), wide(self.zero)

    def apply(self, w: Any, learned: Any) -> jax.Array:
        """``w`` rounded to the grid."""
        del learned
        scale, zero = self._grid()
        return fake_quantize(_dense(w), scale, zero, self.format)

    def compress(self, w: Any, learned: Any, path: str) -> QuantizedArray:
        """Codes and grid; the codes of a sparse array stay sparse."""
        del learned, path
        dense = _dense(w)
        codes, _ = encode(dense, *self._grid(), self.format)
        meta = (np.dtype(dense.dtype), self.format.bits, self.axis, self.group)
        if isinstance(w, SparseArray):
            sparse = w.with_entries(store_codes(codes, self.format.bits))
            return QuantizedArray(sparse, self.scale, self.zero, *meta)
        if self.block is not None and self.axis is not None:
            words = pack(codes, self.format.bits, self.axis, self.block)
            return QuantizedArray(words, self.scale, self.zero, *meta, self.block)
        return QuantizedArray(store_codes(codes, self.format.bits), self.scale, self.zero, *meta)


def quantize(
    format: str | Format, group: int | None = None, symmetric: bool = True, where: Where = None
) -> Compression:
    """Rounds parameters to integers with a scale per channel or group.

    A channel is what shares no sum: axes that the function contracts share one scale, output and
    stack axes have one each; a parameter without contracted axes, such as a bias, has one in all.
    ``symmetric``: ``scale = max|w| / (qmax + 1/2)``. Otherwise the range is that of the values and
    0, with an integer zero point, so that 0.0 stays exact. The scale is decided in ``init`` and
    refreshed by each ``update``. The derivative is straight-through: 1 where rounding alone made
    the code, 0 where the value was clipped.

    Args:
        format: ``"int8"``, ``"int4"`` or ``"int2"``.
        group: Consecutive entries along the last contracted axis that share a scale; by default all
            entries of a channel do. Must divide that axis.
        symmetric: Whether the grid is centred on 0.
        where: Which parameters; by default the floating ones of rank 2 and more, and where uses are
            given only those with a use.

    Returns:
        A `Compression` that stores `QuantizedArray`.

    Raises:
        ValueError: Unknown format; in ``init``: a group that does not divide, infinities.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jnp.array([[0.5, 3.0], [0.9, -1.5]])}
        >>> jc.compress(params, jc.quantize("int4"))["w"].codes
        Array([[4, 7],
               [7, -4]], dtype=int4)

    References:
        Jacob et al., 2018, Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference. Bengio et al., 2013, Estimating or Propagating Gradients
        Through Stochastic Neurons for Conditional Computation.
    """
    fmt = format_of(format)
    if group is not None and group < 1:
        raise ValueError(f"group={group}; a group holds at least one entry")

    def check(parameter: Parameter) -> None:
        if isinstance(parameter.value, (QuantizedArray, LowRankArray)):
            raise TypeError(
                f"{parameter.describe()} is already a {type(parameter.value).__name__} and cannot "
                "be quantized; materialize it first"
            )
        if group is not None:
            _check_group(parameter, group)

    def init(parameter: Parameter) -> Decision:
        shape, layout = tuple(parameter.value.shape), parameter.layout
        axis, block = _packing(shape, layout, fmt, group)
        # With groups every index of the other contracted axes has scales of its own; where nothing
        # is contracted, such as in a bias, a scale per entry would be larger than the entry.
        reduce = (layout.contracting or layout.output) if group is None else ()
        state = QuantizedState(None, None, fmt, reduce, axis, group, block)
        return Decision(refresh(state, None, parameter.value))

    def refresh(state: QuantizedState, count: Any, w: Any) -> QuantizedState:
        del count
        low, high = range_of(_dense(w), state.reduce, state.axis, state.group, symmetric)
        scale, zero = absmax_scale(low, high, fmt, symmetric)
        return dataclasses.replace(state, scale=scale, zero=zero)

    return leafwise(LeafMethod(check, init, refresh), where)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def fake_quantize(w: jax.Array, scale: jax.Array, zero: jax.Array | None, fmt: Format) -> jax.Array:
    """Rounds to a grid and back; the identity for derivatives where nothing was clipped.

    Args:
        w: Floats, any shape.
        scale: Float32 steps that broadcast against ``w``; constants for derivatives.
        zero: Integer zero points likewise, or None.
        fmt: The number format.

    Returns:
        Floats of the shape and dtype of ``w``.
    """
    levels, _ = round_to_grid(w, scale, zero, fmt)
    if zero is not None:
        levels = levels - zero.astype(jnp.float32)
    # Integers have one zero, so the view of a small negative entry is 0.0, not -0.0.
    return decode(jnp.where(levels == 0, 0, levels), scale, w.dtype)


@fake_quantize.defjvp
def _fake_quantize_jvp(fmt, primals, tangents):
    w, scale, zero = primals
    _, inside = round_to_grid(w, scale, zero, fmt)
    return fake_quantize(w, scale, zero, fmt), jnp.where(inside, tangents[0], 0)


def _dense(w: Any) -> jax.Array:
    return w.materialize() if isinstance(w, SparseArray) else w


def _check_group(parameter: Parameter, group: int) -> None:
    shape, axis = parameter.value.shape, parameter.layout.group_axis
    if axis is None:
        raise ValueError(
            f"{parameter.describe()} has no contracted axis to group; leave group out for this leaf"
        )
    length = shape[axis]
    if length % group:
        fitting = [g for g in range(1, length + 1) if length % g == 0]
        near = sorted(fitting, key=lambda g: abs(math.log(g / group)))[:3]
        raise ValueError(
            f"group={group} does not divide axis {axis} of {parameter.describe()}, of length "
            f"{length}; the nearest groups that do are {', '.join(map(str, sorted(near)))}"
        )


def _packing(
    shape: tuple[int, ...], layout: Layout, fmt: Format, group: int | None
) -> tuple[int | None, int | None]:
    """The axis for groups and words, and the entries per block of words.

    Words run along the contraction, where a product can read them run by run; along another axis if
    that one is too short; and not at all where no axis is a multiple of a word: then codes take a
    byte each in memory, and their true width in files.
    """
    axis = layout.group_axis
    if axis is None:
        axis = -1 if shape else None
    if not fmt.packed or axis is None:
        return axis, None
    runs = 8 // fmt.bits
    if group is not None:
        return axis, group if group % runs == 0 else None
    others = [d for d in range(-1, -len(shape) - 1, -1) if d not in layout.stack]
    for d in (axis, *others):
        if shape[d] and shape[d] % runs == 0:
            return d, math.gcd(shape[d], 128)
    return axis, None
