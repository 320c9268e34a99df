"""Quantizing one array, such as a key-value cache, inside or outside of jit."""

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import QuantizedArray
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.numerics.bounds import Bounds
from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.quantization.checks import check_types
from jaxopt_compress.quantization.quantize import ELSEWHERE
from jaxopt_compress.quantization.rule import measured, rule_of
from jaxopt_compress.quantization.state import QuantizedState


@answers(ELSEWHERE)
def quantize_array(
    x: jax.Array,
    format: str | Format,
    axis: int | tuple[int, ...] = -1,
    group_size: int | None = None,
    symmetric: bool = True,
    *,
    bounds: Bounds | None = None,
    scale_dtype: str | None = None,
) -> QuantizedArray:
    """Rounds an array to a number format; jit-able.

    Codes and steps have the rank of ``x``, one entry per code in memory, so one
    `jax.lax.dynamic_update_slice` mapped over the fields writes new rows into a cache.

    Args:
        x: Floats, any shape.
        format: As in `quantize`.
        axis: The axes that share a scale.
        group_size: Consecutive entries along the last of these axes that share a scale; by default
            those of the format, or all of them. A last group may be shorter.
        symmetric: As in `quantize`.
        bounds: As in `quantize`.
        scale_dtype: As in `quantize`; float8_e4m3fn scales, those of nvfp4 among them, are relative
            to one float32 scale for all entries along ``axis``.

    Returns:
        The array in its quantized form, to be passed to a lifted function.

    Raises:
        ValueError: Unknown or contradictory formats, or axes that ``x`` has not.
        TypeError: ``x`` does not hold floats.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> keys = jc.quantize_array(jnp.ones((1, 16, 2, 8)), "int8")  # batch, time, head, channel
        >>> scores = jc.lift(lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k))
        >>> jax.jit(scores)(jnp.ones((1, 1, 2, 8)), keys).shape
        (1, 2, 1, 16)
    """
    fmt = format_of(format)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"quantize_array of {x.dtype}{list(x.shape)}: only floats are rounded")
    check_types(group_size, bounds, None)
    group = fmt.group if group_size is None else group_size
    rule = rule_of(fmt, (group, None), bounds, symmetric, scale_dtype)
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -x.ndim <= d < x.ndim for d in axes) or not axes:
        raise ValueError(f"axis={axis} of an array of shape {tuple(x.shape)}")
    axes = tuple(d % x.ndim - x.ndim for d in axes)
    along = max(axes)
    state = QuantizedState(
        format=fmt,
        reduce=axes if group is None else tuple(d for d in axes if d != along),
        # Steps of few bits are relative to one of the same row: a row can be written alone.
        stack=tuple(d for d in range(-x.ndim, 0) if d not in axes),
        axis=along,
        group_size=group,
    )
    return measured(state, x, rule).compress(x, None, "")
