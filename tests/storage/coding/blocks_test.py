import heapq

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import stats

from jaxopt_compress.storage.coding import blocks

NAMES = [name for name in blocks.CODINGS if name]


def codes(size, bits, seed=0):
    rng = np.random.default_rng(seed)
    middle = 2 ** (bits - 1)
    x = np.rint(rng.normal(size=size) * middle / 4) + middle
    return np.clip(x, 0, 2**bits - 1).astype(np.uint8)


def huffman_bits(counts):
    heap = [int(n) for n in counts if n]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return total


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8).flatmap(
        lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), max_size=300))
    ),
    st.sampled_from([None, *NAMES]),
)
def test_symbols_come_back(case, coding):
    bits, symbols = case
    symbols = np.array(symbols, np.uint8)
    raw = blocks.encode(symbols, bits, coding)
    found, used = blocks.decode(memoryview(raw + b"rest"), len(symbols), bits)
    np.testing.assert_array_equal(found, symbols)
    assert used == len(raw) <= -(-len(symbols) * bits // 8) + 3


@pytest.mark.parametrize("coding", NAMES)
def test_several_blocks_come_back(coding, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    symbols = np.concatenate([codes(2500, 8), np.full(1500, 7, np.uint8)])
    raw = blocks.encode(symbols, 8, coding)
    np.testing.assert_array_equal(blocks.decode(memoryview(raw), 4000, 8)[0], symbols)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_lengths_are_those_of_theory(bits):
    symbols = codes(200_000, bits)
    counts = np.bincount(symbols)
    entropy = len(symbols) * stats.entropy(counts, base=2) / 8
    ans = len(blocks.encode(symbols, bits, "ans"))
    assert entropy < ans < 1.01 * entropy + 64 or ans == len(symbols) * bits // 8 + 4
    huffman = len(blocks.encode(symbols, bits, "huffman"))
    tree = huffman_bits(counts) / 8
    # Its weights are those of the table, rounded to an eighth of their logarithm.
    assert tree - 1 <= huffman < 1.003 * tree + 300 or huffman == len(symbols) * bits // 8 + 4


def test_what_does_not_shrink_is_stored_as_it_is():
    noise = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    for coding in NAMES:
        assert blocks.encode(noise, 8, coding)[3:] == noise.tobytes()


# Made once by these coders (constriction 0.5.0): other versions have to read them, too.
KNOWN = {
    "ans": (
        "023903090204553f504e01dece72fbd4a9895e9033bb678cf92112b02c758c926a1e12"
        "9ab2b28a952e98ef240b6c37efd887ba35bd78fab9f8895d"
    ),
    "huffman": (
        "033903090204553f504e01edca628eea3e3037cce5e9b7eba873894794cabebb6d0f1f"
        "4632e98c3a5c55f8dbf2215097bbb9ef637ab4dd67360000"
    ),
}


@pytest.mark.parametrize("coding", KNOWN)
def test_known_bytes_are_read_and_written(coding):
    symbols = codes(120, 4)
    raw = bytes.fromhex(KNOWN[coding])
    np.testing.assert_array_equal(blocks.decode(memoryview(raw), 120, 4)[0], symbols)
    assert blocks.encode(symbols, 4, coding) == raw


def test_numbers_come_back():
    for n in (0, 1, 127, 128, 300, 2**40):
        raw = blocks.varint(n)
        assert blocks.read_varint(memoryview(raw + b"\xff"), 0) == (n, len(raw))
    with pytest.raises(ValueError, match="cut off"):
        blocks.read_varint(memoryview(b"\xff\xff"), 0)


@pytest.mark.parametrize(
    "raw", [b"", b"\x09\x01\x00", b"\x00\x05\x01", b"\x02\x03\0\0\0", b"\x04\x02ab"]
)
def test_what_is_no_block_is_refused(raw):
    with pytest.raises(ValueError):
        blocks.decode(memoryview(raw), 100, 8)


def test_a_coding_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="coding='zip': one of 'ans'"):
        blocks.check_coding("zip")
