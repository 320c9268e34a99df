"""Sums of codes in few bits, with a scale for each block of them."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.numerics import packing
from jaxopt_compress.numerics.codes import encode, levels_of, round_to_grid
from jaxopt_compress.numerics.formats import FORMATS, Format, format_of
from jaxopt_compress.numerics.steps import symmetric_step
from jaxopt_compress.parallel.reduction import AxisName, Reduction, gather


def blockwise(format: str | Format = "int8", block: int = 256) -> Reduction:
    r"""Averages codes in few bits: all-to-all, a sum in float32, and all-gather.

    Each device rounds its gradient :math:`g_i` in blocks that have a float32 scale each, and sends
    to every device the part that this one owns. The owner sums in float32, rounds again, and sends
    the result to all:

    .. math:: \bar g = Q\Big(\frac 1 D \sum_i Q(g_i)\Big)

    Both directions carry codes, so that a device sends :math:`2 (1 - 1/D)` codes per entry, where
    the all-reduce of a ring sends as many floats: int8 takes a quarter of float32's bytes, and
    1.6% for scales. Both errors are fed back, the second by its owner.

    Args:
        format: A number format of up to 8 bits, with one scale per block.
        block: Consecutive entries of one layer that share a scale.

    Returns:
        A method for `reduced_gradients`; ``"int8"`` there means ``blockwise("int8")``.

    Raises:
        ValueError: The format has more bits or blocks of its own, or ``block`` does not suit it.

    Example:
        >>> import jaxopt_compress as jc
        >>> tx = jc.reduced_gradients(jc.blockwise("int4", block=64), axis_name="data")

    References:
        Seide et al., 2014, 1-Bit Stochastic Gradient Descent. Tang et al., 2021, 1-bit Adam:
        Communication Efficient Large-Scale Training with Adam's Convergence Speed.
    """
    fmt = format_of(format)
    if fmt.bits > 8 or fmt.group is not None or fmt.absmean:
        known = [f.name for f in FORMATS.values() if f.bits <= 8 and not (f.group or f.absmean)]
        raise ValueError(f"blockwise({fmt.name!r}): a format of up to 8 bits: {', '.join(known)}")
    runs = 1 if fmt.bits == 8 else packing.layout(fmt.bits).runs
    if type(block) is not int or block < 1 or block % runs:
        raise ValueError(f"block={block!r}; {fmt.name} takes a multiple of {runs}")

    def mean(m: jax.Array, shared: None, axis_name: AxisName) -> tuple[jax.Array, jax.Array, None]:
        devices = lax.axis_size(axis_name)
        blocks = _in_blocks(m, block, devices)
        wire, scale = _coded(blocks, fmt)
        swap = lambda x: lax.all_to_all(x, axis_name, 0, 0)
        part = _values(swap(wire), swap(scale), fmt).mean(0)
        wire_of_part, scale_of_part = _coded(part, fmt)
        average = _values(gather(wire_of_part, axis_name), gather(scale_of_part, axis_name), fmt)
        share = _values(wire, scale, fmt)
        # The second error is the owner's, and an average divides what one device adds.
        own = lax.axis_index(axis_name)
        lost = devices * (part - _values(wire_of_part, scale_of_part, fmt))
        share = share.at[own].add(-lost)
        return _back(average, m.shape, block), _back(share, m.shape, block), None

    takes = lambda shape: math.prod(shape) > 0
    return Reduction(f"blockwise({fmt.name!r})", takes, lambda shape, key: None, mean)


def _in_blocks(m: jax.Array, block: int, devices: int) -> jax.Array:
    """``[devices, blocks, block]``: no block spans two layers; filled up with zeros."""
    flat = m.reshape(m.shape[0], -1)
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % block))).reshape(-1, block)
    return jnp.pad(flat, ((0, -len(flat) % devices), (0, 0))).reshape(devices, -1, block)


def _back(blocks: jax.Array, shape: tuple[int, ...], block: int) -> jax.Array:
    """Inverts `_in_blocks`."""
    layers, size = shape[0], math.prod(shape[1:])
    each = -(-size // block)
    flat = blocks.reshape(-1, block)[: layers * each].reshape(layers, each * block)
    return flat[:, :size].reshape(shape)


def _coded(blocks: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array]:
    """Bytes, and the scales of blocks, of size 1 along the last axis."""
    scale = symmetric_step(jnp.max(jnp.abs(blocks), -1, keepdims=True), fmt)
    codes = encode(round_to_grid(blocks, scale, None, fmt)[0], fmt)
    if fmt.bits < 8:
        wide = codes.astype(jnp.int8 if fmt.grid.signed else jnp.uint8)
        return packing.pack(wide, fmt.bits, -1, blocks.shape[-1]), scale
    # Not all collectives know floats of 8 bits.
    return codes if codes.dtype == jnp.int8 else lax.bitcast_convert_type(codes, jnp.uint8), scale


def _values(wire: jax.Array, scale: jax.Array, fmt: Format) -> jax.Array:
    """What `_coded` stands for."""
    if fmt.bits < 8:
        block = wire.shape[-1] * 8 // fmt.bits
        wire = packing.unpack(wire, fmt.bits, -1, block, fmt.grid.signed)
    elif jnp.issubdtype(fmt.dtype, jnp.floating):
        wire = lax.bitcast_convert_type(wire, fmt.dtype)
    return levels_of(wire, fmt) * scale
