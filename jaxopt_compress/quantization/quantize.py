"""Quantization of parameters to any number format, with straight-through gradients."""

import dataclasses
import math
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.arrays import LowRankArray, QuantizedArray
from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    Parameter,
    compression_of,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.numerics.bounds import Bounds
from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.packing import layout as words_layout
from jaxopt_compress.quantization.activations import Activations, Backward
from jaxopt_compress.quantization.checks import (
    check_group,
    check_per,
    check_times,
    check_types,
)
from jaxopt_compress.quantization.products import asked_of_grid, with_products
from jaxopt_compress.quantization.rule import Rule, measured, rule_of
from jaxopt_compress.quantization.state import QuantizedState, dense
from jaxopt_compress.tree import Layout, Where

ELSEWHERE = {
    **dict.fromkeys(
        ("bits", "nbits", "n_bits", "num_bits", "weight_qtype", "qtype", "dtype"),
        "the format says it, as in quantize('int4')",
    ),
    **dict.fromkeys(
        ("act", "act_bits", "act_qtype", "inputs", "input_steps", "activation"),
        "write activations='int8', or activations=jaxopt_compress.activations('int8', ...)",
    ),
    **dict.fromkeys(
        ("gradients", "residuals", "bwd_qtype"),
        "write backward=jaxopt_compress.backward('int8', residuals=...)",
    ),
    **dict.fromkeys(
        ("per_channel", "per_tensor", "channel_wise", "channelwise"),
        "write per='channel' or per='tensor'",
    ),
    **dict.fromkeys(("group", "groups", "block_size", "tile_size"), "write group_size="),
    **dict.fromkeys(("sym", "asymmetric"), "write symmetric=True or symmetric=False"),
    **dict.fromkeys(("scale", "scales_dtype"), "write scale_dtype="),
}


@answers(ELSEWHERE)
def quantize(
    format: str | Format,
    group_size: int | tuple[int, int] | None = None,
    symmetric: bool = True,
    where: Where = None,
    *,
    stack: int = 0,
    per: str = "channel",
    bounds: Bounds | None = None,
    scale_dtype: str | None = None,
    key: jax.Array | None = None,
    pad: bool = False,
    begin: int = 0,
    freeze: int | None = None,
    activations: Activations | str | None = None,
    backward: Backward | str | None = None,
) -> Compression:
    """Rounds parameters to a number format, with a scale per channel, group, tile or tensor.

    A channel is what shares no sum: axes that the function contracts share one scale, output and
    stack axes have one each; a parameter without contracted axes, such as a bias, has one in all.
    ``symmetric``: the largest magnitude lies half a step above the top integer, or at the largest
    level of other formats. Otherwise (integers only) the range is that of the values and 0, with an
    integer zero point, so that 0.0 stays exact. The scale is decided in ``init`` and renewed by
    each ``update``. The derivative is straight-through: 1 everywhere if the grid follows the whole
    range; where it may leave out values (other ``bounds`` than `absmax`, ``freeze``, scales in
    8-bit floats, mx formats and nvfp4 among them), 0 for those that it clips; 1 for binary and
    ternary.

    Args:
        format: Integers ``"int1"`` to ``"int8"``, ``"int16"``, ``"uint1"`` to ``"uint8"``;
            ``"binary"`` and ``"ternary"`` (scale: the mean magnitude); ``"float8_e4m3fn"``,
            ``"float8_e5m2"``, ``"float6_e2m3fn"``, ``"float6_e3m2fn"``, ``"float4_e2m1fn"``;
            powers of two ``"pot3"``, ``"pot4"``, ``"pot5"``; ``"nf4"``; odd integers ``"odd2"``,
            ``"odd3"``, ``"odd4"``, a grid without 0; and, with groups and scales
            of their own, ``"mxfp8"``, ``"mxfp8_e5m2"``, ``"mxfp6"``, ``"mxfp6_e3m2"``, ``"mxfp4"``
            and ``"nvfp4"``.
        group_size: Consecutive entries along the last contracted axis that share a scale, or, as a
            pair, these and entries along the last output axis; by default those of the format, or
            all entries of a channel. Must divide the axes, unless ``pad``.
        symmetric: Whether the grid is centred on 0.
        where: Which parameters; by default the floating ones of rank 2 and more, and where uses are
            given only those with a use.
        stack: How many leading axes of each are a stack of parameters of their own, whatever uses
            say of them, such as the members of an ensemble under `jax.vmap`.
        per: ``"channel"``; or, without groups, ``"tensor"``: one scale for all of a parameter, and
            for each entry of a stack.
        bounds: Which range the grid covers: one of `jaxopt_compress.bounds`.
        scale_dtype: What holds the scales: ``"float32"``, ``"bfloat16"``, ``"float16"`` (scales
            beyond its range are brought to its ends), ``"float8_e8m0fnu"`` (powers of two) or
            ``"float8_e4m3fn"`` (relative to one float32 scale per parameter); by default that of
            the format.
        key: A random key: rounds stochastically, anew after each ``update``.
        pad: Whether the last group may be shorter, its range taken as if zeros filled it up.
        begin: The update after which parameters are quantized; until then they are left as they
            are.
        freeze: The update after which scales stay as they are.
        activations: How the activations that meet a parameter are rounded: `activations`, or the
            name of a format such as ``"int8"``. The view is then for lifted functions only. By
            default they are left as they are.
        backward: What the backward pass of products does: `backward`, or the name of the
            cotangents' format such as ``"int8"``. By default it multiplies the rounded factors in
            floats.

    Returns:
        A `Compression` that stores `QuantizedArray`, with ``activations`` in an
        `InputQuantizedArray`.

    Raises:
        ValueError: Unknown or contradictory formats; in ``init``: a group that does not divide,
            infinities, negative values for an unsigned symmetric format, missing ``stats``.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jnp.array([[0.5, 3.0], [0.9, -1.5]])}
        >>> jc.compress(params, jc.quantize("int4"))["w"].codes
        Array([[4, 7],
               [7, -4]], dtype=int4)

    References:
        Jacob et al., 2018, Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference. Bengio et al., 2013, Estimating or Propagating Gradients
        Through Stochastic Neurons for Conditional Computation. Dettmers et al., 2023, QLoRA:
        Efficient Finetuning of Quantized LLMs. Rouhani et al., 2023, Microscaling Data Formats for
        Deep Learning.
    """
    weights = quantize_method(
        format,
        group_size,
        symmetric,
        per=per,
        bounds=bounds,
        scale_dtype=scale_dtype,
        key=key,
        pad=pad,
        begin=begin,
        freeze=freeze,
    )
    asked = asked_of_grid(
        "quantize",
        format,
        group_size,
        where,
        symmetric=symmetric,
        stack=stack,
        per=per,
        scale_dtype=scale_dtype,
        activations=activations,
        backward=backward,
    )
    method = with_products(weights, activations, backward, begin)
    return compression_of(method, where, stack=stack, asked=asked)


def quantize_method(
    format: str | Format,
    group_size: int | tuple[int, int] | None = None,
    symmetric: bool = True,
    *,
    per: str = "channel",
    bounds: Bounds | None = None,
    scale_dtype: str | None = None,
    key: jax.Array | None = None,
    pad: bool = False,
    begin: int = 0,
    freeze: int | None = None,
) -> LeafMethod:
    """How `quantize` decides on one parameter."""
    fmt = format_of(format)
    check_types(group_size, bounds, key)
    check_times(begin, freeze)
    along, across = group_size if isinstance(group_size, tuple) else (group_size, None)
    along = fmt.group if along is None else along
    rule = rule_of(fmt, (along, across), bounds, symmetric, scale_dtype)
    check_per(per, along, across)
    asked = _Asked(fmt, rule, along, across, per, key, pad, begin, freeze)
    return LeafMethod(asked.check, asked.init, asked.update)


class _Asked(NamedTuple):
    """What the grid of a parameter follows, as the arguments of `quantize_method`.

    ``along`` and ``across`` are the two group sizes.
    """

    fmt: Format
    rule: Rule
    along: int | None
    across: int | None
    per: str
    key: jax.Array | None
    pad: bool
    begin: int
    freeze: int | None

    def check(self, parameter: Parameter) -> None:
        """Refuses what has no such grid."""
        if isinstance(parameter.value, (QuantizedArray, LowRankArray)):
            raise TypeError(
                f"{parameter.describe()} is already a {type(parameter.value).__name__} and cannot "
                "be quantized; materialize it first"
            )
        layout, w = parameter.layout, parameter.value
        if self.along is not None:
            check_group(parameter, layout.group_axis, self.along, self.pad)
        if self.across is not None:
            check_group(parameter, max(layout.output, default=None), self.across, self.pad)
        grid = self.fmt.grid
        if self.rule.symmetric and isinstance(grid, Integers) and not grid.signed:
            with jax.ensure_compile_time_eval():
                negative = not is_traced(w) and w.size and bool(jnp.any(dense(w) < 0))
            if negative:
                raise ValueError(
                    f"{parameter.describe()} has negative entries, which {self.fmt.name!r} cannot "
                    "hold on a grid centred on 0; pass symmetric=False, or take a signed format"
                )

    def init(self, parameter: Parameter) -> Decision:
        """The first grid."""
        shape, layout, fmt = tuple(parameter.value.shape), parameter.layout, self.fmt
        axis, block = _packing(shape, layout, fmt, self.along)
        # With groups every index of the other contracted axes has scales of its own; where nothing
        # is contracted, such as in a bias, a scale per entry would be larger than the entry.
        reduce = (layout.contracting or layout.output) if self.along is None else ()
        if self.per == "tensor":
            reduce = tuple(d for d in range(-len(shape), 0) if d not in layout.stack)
        key = self.key
        if key is not None:
            key = jax.random.fold_in(key, zlib.crc32(parameter.path.encode()))
        state = QuantizedState(
            key=key,
            active=None if self.begin == 0 else jnp.zeros((), bool),
            format=fmt,
            reduce=reduce,
            stack=layout.stack,
            axis=axis,
            group_size=self.along,
            block=block,
            tile=None if self.across is None else (max(layout.output), self.across),
            clips=self.rule.clips(fmt) or (self.freeze is not None and not fmt.absmean),
        )
        return Decision(measured(state, parameter.value, self.rule))

    def update(self, decision: Decision, count: jax.Array, parameter: Parameter) -> Decision:
        """The grid after a step of training."""
        state, w = decision.state, parameter.value
        if state.active is not None:
            state = dataclasses.replace(state, active=count >= self.begin)
        if state.key is not None:
            state = dataclasses.replace(state, key=jax.random.fold_in(state.key, count))
        renewed = lambda: measured(state, w, self.rule)
        if self.freeze is None:
            return Decision(renewed())
        return Decision(lax.cond(count <= self.freeze, renewed, lambda: state))


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
    runs = words_layout(fmt.bits).runs
    if group is not None:
        whole = group % runs == 0 and shape[axis] % group == 0
        return axis, group if whole else None
    others = [d for d in range(-1, -len(shape) - 1, -1) if d not in layout.stack]
    for d in (axis, *others):
        if shape[d] and shape[d] % runs == 0:
            return d, math.gcd(shape[d], 128)
    return axis, None
