"""Arrays of every dtype as what a file can hold: native numbers, or uint8 words of full bytes."""

import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

# Codes that are packed at a time; each takes some ten bytes in between.
_PIECE = 2**18
_NATIVE = frozenset(
    {"bool", "bfloat16", "float16", "float32", "float64", "complex64", "complex128"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)


def is_native(dtype: np.dtype) -> bool:
    """Whether array files know the dtype; others are stored as words."""
    return np.dtype(dtype).name in _NATIVE


def words_axis(shard_shape: tuple[int, ...]) -> int | None:
    """The last axis that every shard can pack on its own, negative; None to pack the whole flat."""
    fitting = (d for d in range(-1, -len(shard_shape) - 1, -1) if shard_shape[d] % 8 == 0)
    return next(fitting, None) if math.prod(shard_shape) else None


def words_shape(shape: tuple[int, ...], bits: int, axis: int | None) -> tuple[int, ...]:
    """The shape of the words of an array.

    Example:
        >>> words_shape((3, 16), 4, -1), words_shape((3, 5), 4, None)
        ((3, 8), (8,))
    """
    if bits == 8:
        return shape
    if axis is None:
        return (-(-math.prod(shape) * bits // 8),)
    return tuple(n * bits // 8 if d - len(shape) == axis else n for d, n in enumerate(shape))


def to_words(codes: np.ndarray, bits: int, axis: int | None) -> np.ndarray:
    """Packs the low ``bits`` bits of each entry, the first entry in the lowest bits of a byte.

    Entry ``i`` takes the bits ``[i * bits, (i + 1) * bits)`` of the stream of bytes along ``axis``,
    or of the one stream of the flattened array.

    Args:
        codes: An array of integers, or of floats of at most 8 bits, any shape.
        bits: From 1 to 8.
        axis: A negative axis whose length is a multiple of 8, or None; unused for 8 bits.

    Returns:
        uint8 words, of the shape `words_shape`.

    Example:
        >>> import numpy as np
        >>> to_words(np.array([1, -1, 2], np.int8), 4, None)
        array([241,   2], dtype=uint8)
    """
    if bits == 8:
        return _raw(codes)
    words = np.empty(words_shape(codes.shape, bits, axis), np.uint8)
    if axis is None:
        codes, axis = codes.reshape(-1), -1
    for part, packed in _pieces(codes.shape, bits, axis):
        words[packed] = _pack(_raw(codes[part]), bits, axis)
    return words


def _pack(low: np.ndarray, bits: int, axis: int) -> np.ndarray:
    low = np.moveaxis(low, axis, -1)
    missing = -low.shape[-1] % 8
    if missing:
        # Only of the last piece of a flat array.
        low = np.append(low, np.zeros(missing, np.uint8))
    eights = low.reshape(*low.shape[:-1], low.shape[-1] // 8, 8)
    # Eight codes are a whole number of bytes: the lowest ones of a little-endian integer.
    stream = np.zeros(eights.shape[:-1], "<u8")
    for j in range(8):
        stream |= (eights[..., j] & np.uint8(2**bits - 1)).astype("<u8") << np.uint64(j * bits)
    words = stream[..., None].view(np.uint8)[..., :bits]
    words = words.reshape(*words.shape[:-2], words.shape[-2] * bits)
    words = words[: words.shape[-1] - missing * bits // 8] if missing else words
    return np.moveaxis(words, -1, axis)


def from_words(
    words: np.ndarray, bits: int, axis: int | None, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """Inverts `to_words`.

    Args:
        words: uint8.
        bits: As in `to_words`.
        axis: As in `to_words`.
        shape: The shape of the result.
        dtype: Its dtype.

    Example:
        >>> import numpy as np
        >>> from_words(np.array([241, 2], np.uint8), 4, None, (3,), np.dtype(np.int8))
        array([ 1, -1,  2], dtype=int8)
    """
    dtype = np.dtype(dtype)
    if bits == 8:
        return _typed(words, 8, dtype)
    codes = np.empty(shape if axis is not None else math.prod(shape), dtype)
    along = -1 if axis is None else axis
    for part, packed in _pieces(codes.shape, bits, along):
        own = _unpack(words[packed], bits, along, codes[part].shape[along])
        codes[part] = _typed(own, bits, dtype)
    return codes.reshape(shape)


def _unpack(words: np.ndarray, bits: int, axis: int, length: int) -> np.ndarray:
    words = np.moveaxis(words, axis, -1)
    if words.shape[-1] % bits:
        # Only of the last piece of a flat array.
        words = np.append(words, np.zeros(-words.shape[-1] % bits, np.uint8))
    streams = np.zeros((*words.shape[:-1], words.shape[-1] // bits, 8), np.uint8)
    streams[..., :bits] = words.reshape(*words.shape[:-1], words.shape[-1] // bits, bits)
    stream = streams.view("<u8")[..., 0]
    codes = np.empty(streams.shape, np.uint8)
    for j in range(8):
        codes[..., j] = (stream >> np.uint64(j * bits)).astype(np.uint8) & np.uint8(2**bits - 1)
    codes = codes.reshape(*codes.shape[:-2], codes.shape[-2] * 8)[..., :length]
    return np.moveaxis(codes, -1, axis)


def _pieces(
    shape: tuple[int, ...], bits: int, axis: int
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Slices of codes, and of their words: they are packed some at a time, to take little memory.

    The longest axis is cut; along ``axis``, into whole words.
    """
    cut = max(range(-len(shape), 0), key=lambda d: (shape[d], d))
    length = shape[cut]
    step = max(8, _PIECE * length // max(math.prod(shape), 1) // 8 * 8)
    along = lambda start, stop: tuple(
        slice(start, stop) if d == cut else slice(None) for d in range(-len(shape), 0)
    )
    for start in range(0, length, step):
        stop = min(start + step, length)
        part = along(start, stop)
        yield part, along(start * bits // 8, -(-stop * bits // 8)) if cut == axis else part


def _raw(x: np.ndarray) -> np.ndarray:
    """The bits of each entry in a uint8."""
    if jnp.issubdtype(x.dtype, jnp.signedinteger):
        return x.astype(np.int8).view(np.uint8)
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return x.astype(np.uint8)
    return x.view(np.uint8)


def _typed(raw: np.ndarray, bits: int, dtype: np.dtype) -> np.ndarray:
    """Entries from their bits in a uint8."""
    if jnp.issubdtype(dtype, jnp.signedinteger):
        left = np.uint8(8 - bits)
        signed = (raw << left).view(np.int8) >> left.astype(np.int8)
        # Shifts make scalars of arrays of rank 0.
        return np.asarray(signed).astype(dtype)
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        return raw.astype(dtype)
    return raw.view(dtype)
