"""Streams of symbols of at most 8 bits as bytes, block by block."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxopt_compress.extras import require
from jaxopt_compress.storage.coding import contexts, mixing, tables
from jaxopt_compress.storage.words import from_words, to_words

# Symbols per block: what is decoded at a time.
BLOCK = 2**20
_ZSTD_LEVEL = 9


class Method(NamedTuple):
    """A way to code a block.

    Attributes:
        encode: ``encode(symbols, bits, columns)``: uint8 symbols to bytes, or None if it cannot.
        decode: ``decode(payload, count, bits, columns)``: uint8 symbols.
    """

    encode: Callable[[np.ndarray, int, int], bytes | None]
    decode: Callable[[memoryview, int, int, int], np.ndarray]


def encode(symbols: np.ndarray, bits: int, coding: str | None, columns: int = 1) -> bytes:
    """Codes symbols, each block in the shortest of the ways that a coding has.

    Args:
        symbols: uint8 of rank 1, each below ``2**bits``.
        bits: From 1 to 8.
        coding: One of `CODINGS`; None only packs them.
        columns: How many make a row of the array, for contexts.

    Returns:
        For each block the number of its method, the length of its data, and the data.
    """
    out = bytearray()
    for block in _cut(symbols, columns):
        found = []
        for number in CODINGS[coding]:
            payload = METHODS[number].encode(block, bits, columns)
            if payload is not None:
                found.append((len(payload), number, payload))
        size, number, payload = min(found)
        out.append(number)
        out += varint(size)
        out += payload
    return bytes(out)


def decode(raw: memoryview, count: int, bits: int, columns: int = 1) -> tuple[np.ndarray, int]:
    """Inverts `encode`.

    Args:
        raw: Bytes that begin with the blocks.
        count: How many symbols there are.
        bits: As in `encode`.
        columns: As in `encode`.

    Returns:
        The symbols, and the number of bytes that held them.

    Raises:
        ValueError: The bytes are no such blocks.
    """
    blocks = -(-count // _step(columns))
    if len(raw) < 2 * blocks:
        raise ValueError("it is cut off")
    symbols, at = np.empty(count, np.uint8), 0
    for part in _cut(symbols, columns):
        number = raw[at] if at < len(raw) else -1
        size, at = read_varint(raw, at + 1)
        if number not in METHODS or at + size > len(raw):
            raise ValueError(f"a block by method {number} of {size} bytes")
        part[:] = METHODS[number].decode(raw[at : at + size], len(part), bits, columns)
        at += size
    return symbols, at


def varint(n: int) -> bytes:
    """A number in 7 bits per byte, the lowest ones first; all bytes but the last are above 127.

    Example:
        >>> list(varint(300))
        [172, 2]
    """
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def read_varint(raw: memoryview, at: int) -> tuple[int, int]:
    """The number that `varint` wrote at ``at``, and where it ends."""
    value = 0
    for shift in range(0, 63, 7):
        if at >= len(raw):
            break
        byte, at = raw[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number is cut off")


def _cut(symbols: np.ndarray, columns: int) -> Iterator[np.ndarray]:
    step = _step(columns)
    for start in range(0, len(symbols), step):
        yield symbols[start : start + step]


def _step(columns: int) -> int:
    """Symbols per block: whole rows, but of very long ones."""
    return max(BLOCK // max(columns, 1) * columns, BLOCK // 2)


def _pack(symbols: np.ndarray, bits: int, _: int = 1) -> bytes:
    return symbols.tobytes() if bits == 8 else to_words(symbols, bits, None).tobytes()


def _unpack(payload: memoryview, count: int, bits: int, _: int = 1) -> np.ndarray:
    words = np.frombuffer(payload, np.uint8)
    if len(words) != -(-count * bits // 8):
        raise ValueError(f"{len(words)} bytes of {count} symbols of {bits} bits")
    return words if bits == 8 else from_words(words, bits, None, (count,), np.dtype(np.uint8))


def _repeat(symbols: np.ndarray, *_: int) -> bytes | None:
    return symbols[:1].tobytes() if (symbols == symbols[0]).all() else None


def _repeated(payload: memoryview, count: int, *_: int) -> np.ndarray:
    if len(payload) != 1:
        raise ValueError(f"{len(payload)} bytes of a symbol that repeats")
    return np.full(count, payload[0], np.uint8)


def _table(symbols: np.ndarray) -> tables.Table | None:
    counts = np.bincount(symbols, minlength=256)
    return tables.fit(counts) if np.count_nonzero(counts) > 1 else None


def _shares(table: tables.Table) -> np.ndarray:
    # Sums and products of float64 are the same on every machine, and constriction rounds them to
    # 24 bits in a fixed order.
    return table.weights.astype(np.float64) / float(table.weights.sum())


def _model(table: tables.Table) -> Any:
    model = require("constriction", extra="coding").stream.model
    return model.Categorical(_shares(table), perfect=False)


def _ans(symbols: np.ndarray, *_: int) -> bytes | None:
    table = _table(symbols)
    if table is None:
        return None
    coder = require("constriction", extra="coding").stream.stack.AnsCoder()
    coder.encode_reverse(symbols.astype(np.int32) - table.low, _model(table))
    return table.raw + coder.get_compressed().astype("<u4").tobytes()


def _from_ans(payload: memoryview, count: int, *_: int) -> np.ndarray:
    table, at = tables.read(payload)
    coder = require("constriction", extra="coding").stream.stack.AnsCoder(_words(payload[at:]))
    found = coder.decode(_model(table), count)
    return (found + table.low).astype(np.uint8)


def _huffman(symbols: np.ndarray, *_: int) -> bytes | None:
    table = _table(symbols)
    if table is None:
        return None
    symbol = require("constriction", extra="coding").symbol
    tree, coder = symbol.huffman.EncoderHuffmanTree(_shares(table)), symbol.QueueEncoder()
    for x in (symbols.astype(np.int32) - table.low).tolist():
        coder.encode_symbol(x, tree)
    return table.raw + coder.get_compressed()[0].astype("<u4").tobytes()


def _from_huffman(payload: memoryview, count: int, *_: int) -> np.ndarray:
    table, at = tables.read(payload)
    symbol = require("constriction", extra="coding").symbol
    tree = symbol.huffman.DecoderHuffmanTree(_shares(table))
    coder = symbol.QueueDecoder(_words(payload[at:]))
    found = np.fromiter((coder.decode_symbol(tree) for _ in range(count)), np.int64, count)
    return (found + table.low).astype(np.uint8)


def _zstd(symbols: np.ndarray, bits: int, _: int = 1) -> bytes:
    coder = require("zstandard", extra="coding").ZstdCompressor(
        level=_ZSTD_LEVEL, write_content_size=False
    )
    return coder.compress(_pack(symbols, bits))


def _from_zstd(payload: memoryview, count: int, bits: int, _: int = 1) -> np.ndarray:
    zstandard = require("zstandard", extra="coding")
    size = -(-count * bits // 8)
    try:
        raw = zstandard.ZstdDecompressor().decompress(payload, max_output_size=size)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    return _unpack(memoryview(raw), count, bits)


def _context(symbols: np.ndarray, _: int, columns: int) -> bytes:
    return contexts.encode(symbols, min(columns, len(symbols)))


def _from_context(payload: memoryview, count: int, _: int, columns: int) -> np.ndarray:
    return contexts.decode(payload, count, min(columns, count))


def _words(payload: memoryview) -> np.ndarray:
    if len(payload) % 4:
        raise ValueError(f"{len(payload)} bytes of words of 4")
    return np.frombuffer(payload, "<u4").astype(np.uint32)


def _mixed(symbols: np.ndarray, bits: int, columns: int) -> bytes | None:
    return mixing.encode(symbols, bits, min(columns, len(symbols)))


def _from_mixed(payload: memoryview, count: int, bits: int, columns: int) -> np.ndarray:
    return mixing.decode(payload, count, bits, min(columns, count))


METHODS = {
    0: Method(_pack, _unpack),
    1: Method(_repeat, _repeated),
    2: Method(_ans, _from_ans),
    3: Method(_huffman, _from_huffman),
    4: Method(_zstd, _from_zstd),
    5: Method(_context, _from_context),
    6: Method(_mixed, _from_mixed),
}
# The methods of which a coding takes the shortest for each block.
CODINGS: dict[str | None, tuple[int, ...]] = {
    None: (0,),
    "ans": (0, 1, 2),
    "huffman": (0, 1, 3),
    "zstd": (0, 4),
    "context": (0, 1, 2, 5, 6),
}


@functools.cache
def check_coding(coding: str | None) -> None:
    """Raises unless a coding is known and what it needs is installed."""
    if coding not in CODINGS or coding is None:
        known = ", ".join(repr(name) for name in CODINGS if name)
        raise ValueError(f"coding={coding!r}: one of {known}, or None for plain arrays")
    for module in ("constriction", "zstandard"):
        require(module, extra="coding")
