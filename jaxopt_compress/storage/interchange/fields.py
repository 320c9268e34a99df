"""What other formats take of a `QuantizedArray`: plain integers and steps along the last axis."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import QuantizedArray, is_compressed
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.typing import Leaf


class Linear(NamedTuple):
    """A quantized weight as other libraries know it.

    Attributes:
        codes: int8 or uint8, [out, in].
        scale: [out, groups] or [out, 1].
        zero: Integers like ``scale``, or None.
        bits: Bits per code.
        group_size: Entries along the last axis that share a scale, or None.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    bits: int
    group_size: int | None


def check_layout(layout: str) -> None:
    """Refuses a word that is not a layout of a matrix."""
    if layout not in ("out,in", "in,out"):
        raise ValueError(f"layout={layout!r}: 'out,in' or 'in,out'")


def linear_of(path: str, leaf: Leaf, layout: str) -> Linear:
    """The fields of a leaf.

    Args:
        path: For messages.
        leaf: A `QuantizedArray` of rank 2.
        layout: ``"out,in"`` or ``"in,out"``, the order of the leaf's axes.

    Raises:
        ValueError: Its form has no counterpart; says which one has.
    """
    check_layout(layout)
    where, wanted = f"{path!r} of shape {leaf.shape}", -1 if layout == "out,in" else -2
    refuse = lambda why: ValueError(f"{where} cannot be written: {why}")
    if not isinstance(leaf, QuantizedArray):
        raise refuse(f"it is a {type(leaf).__name__}, not a QuantizedArray; materialize it")
    if not isinstance(leaf.fmt.grid, Integers) or leaf.bits > 8:
        raise refuse(f"{leaf.format} is no format of at most 8-bit integers")
    if leaf.ndim != 2 or is_compressed(leaf.codes) or is_compressed(leaf.scale) or leaf.tile:
        raise refuse("only matrices of plain codes with one scale per row or group have a form")
    if leaf.group_size is not None and leaf.axis != wanted:
        raise refuse(f"its groups run along axis {leaf.axis}, not along the inputs of {layout}")
    turn = lambda x: np.asarray(x).T if layout == "in,out" else np.asarray(x)
    scale = turn(leaf.scale)
    codes = turn(leaf.unpacked().astype(jnp.int8 if leaf.fmt.grid.signed else jnp.uint8))
    group = leaf.group_size
    if group is not None and codes.shape[1] % group:
        raise refuse(f"its last group is shorter than {group}")
    if group is None and scale.shape[1] != 1:
        raise refuse(f"its scales {scale.shape} run along the inputs; quantize per output channel")
    rows = lambda x: np.broadcast_to(x, (codes.shape[0], x.shape[1]))
    zero = None if leaf.zero is None else rows(turn(leaf.zero))
    return Linear(codes, rows(scale), zero, leaf.bits, group)


def leaf_of(linear: Linear, signed: bool = True) -> QuantizedArray:
    """A `QuantizedArray`, [out, in], of the fields of another format."""
    name = f"{'int' if signed else 'uint'}{linear.bits}"
    scale = jnp.asarray(linear.scale)
    dtype = scale.dtype
    # The dtypes of codes and zero points follow from the format.
    leaf = QuantizedArray(linear.codes, scale, None, dtype, name, -1, linear.group_size)
    zero = None
    if linear.zero is not None:
        zero = jnp.asarray(linear.zero, jnp.int8 if signed else jnp.uint8)
    leaf = leaf.replace(codes=jnp.asarray(linear.codes).astype(leaf.fmt.dtype), zero=zero)
    leaf.check()
    return leaf


def unpack_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes from int32 words along the last axis: a stream of bits, the lowest first.

    Example:
        >>> unpack_words(np.array([[0x76543210]], np.int32), 4, 8).tolist()
        [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    if words.shape[-1] != -(-count * bits // 32):
        raise ValueError(f"{words.shape[-1]} words hold no {count} codes of {bits} bits")
    stream = np.ascontiguousarray(words.astype("<i4")).view(np.uint8)
    ones = np.unpackbits(stream, axis=-1, bitorder="little")[..., : count * bits]
    ones = ones.reshape(*words.shape[:-1], count, bits)
    return (ones << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Inverts `unpack_words`; the last word is filled up with zeros."""
    ones = codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8) & np.uint8(1)
    ones = ones.reshape(*codes.shape[:-1], codes.shape[-1] * bits)
    missing = -ones.shape[-1] % 32
    ones = np.concatenate([ones, np.zeros((*ones.shape[:-1], missing), np.uint8)], -1)
    return np.packbits(ones, axis=-1, bitorder="little").view("<i4").astype(np.int32)
