"""Codes one by one: what goes in comes out, and what rows and columns know is saved."""

import numpy as np
import pytest

from jaxopt_compress.storage.coding import mixing


def coded(symbols, bits, columns):
    raw = mixing.encode(symbols, bits, columns)
    assert raw is not None
    np.testing.assert_array_equal(
        mixing.decode(memoryview(raw), len(symbols), bits, columns), symbols
    )
    return len(raw)


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_any_symbols(bits):
    """Of all values, with a last row that is shorter, and of one row or one column."""
    rng = np.random.default_rng(bits)
    symbols = rng.integers(0, 2**bits, 103).astype(np.uint8)
    for columns in (1, 10, 103):
        coded(symbols, bits, columns)
    coded(np.full(50, 2**bits - 1, np.uint8), bits, 10)


@pytest.mark.ci
def test_rows_and_columns_that_differ_take_less_than_their_common_entropy():
    """Of a mask whose rows and columns are kept by shares of their own."""
    rng = np.random.default_rng(0)
    share = np.outer(rng.beta(0.4, 1, 300), rng.beta(0.4, 1, 90))
    mask = (rng.random(share.shape) < share).astype(np.uint8)
    p = mask.mean()
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) * mask.size / 8
    own = np.clip(share, 1e-9, 1 - 1e-9)
    bound = -(own * np.log2(own) + (1 - own) * np.log2(1 - own)).sum() / 8
    size = coded(mask.reshape(-1), 1, 90)
    assert bound < size < 0.8 * entropy


def test_what_would_take_long_is_left_to_others():
    rng = np.random.default_rng(1)
    assert mixing.encode(rng.integers(0, 256, 2**17).astype(np.uint8), 8, 512) is None


def test_damaged_words_are_refused_or_give_symbols_of_their_width():
    symbols = np.random.default_rng(0).integers(0, 4, 200).astype(np.uint8)
    raw = bytearray(mixing.encode(symbols, 2, 10) or b"")
    for at in range(1, len(raw)):
        torn = bytes(raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :])
        try:
            found = mixing.decode(memoryview(torn), len(symbols), 2, 10)
        except ValueError:
            continue
        assert found.max() < 4
