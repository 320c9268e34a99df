import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import stats

from jaxopt_compress.storage.coding import integers

VALUES = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 2**64 - 1)), max_size=60)


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_integers_of_any_size_come_back(values):
    values = np.array(values, np.uint64)
    raw = integers.encode(values, "ans")
    found, used = integers.decode(memoryview(raw + b"rest"), len(values))
    assert found.dtype == np.uint64 and used == len(raw)
    np.testing.assert_array_equal(found, values)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60))
def test_golomb_rice_is_unary_and_remainder(values):
    raw = integers.encode_rice(np.array(values, np.uint64))
    found, used = integers.decode_rice(memoryview(raw + b"rest"), len(values))
    assert found.tolist() == values and used == len(raw)
    # The same in text, one value after the other.
    lengths = [sum((v >> k) + 1 + k for v in values) for k in range(14)]
    k = raw[0]
    assert lengths[k] == min(lengths)
    unary = "".join("0" * (v >> k) + "1" for v in values)
    size, at = raw[1], 2
    if size < 128:
        bits = "".join(f"{byte:08b}"[::-1] for byte in raw[at : at + size])
        assert bits.rstrip("0") == unary


@pytest.mark.parametrize("kept", [0.5, 0.1, 0.003])
def test_gaps_of_independent_positions_take_their_entropy(kept):
    # Several pieces of loose bits.
    gaps = (np.random.default_rng(0).geometric(kept, 40_000) - 1).astype(np.uint64)
    ideal = len(gaps) * stats.geom(kept).entropy() / np.log(2) / 8
    size = len(integers.encode(gaps, "ans"))
    assert 0.98 * ideal < size < 1.01 * ideal + 64
    rice = len(integers.encode_rice(gaps))
    assert 0.98 * ideal < rice < 1.1 * ideal + 8 and abs(rice - integers.rice_bytes(gaps)) < 8
    np.testing.assert_array_equal(
        integers.decode_rice(memoryview(integers.encode_rice(gaps)), 40_000)[0], gaps
    )
    np.testing.assert_array_equal(
        integers.decode(memoryview(integers.encode(gaps, "ans")), 40_000)[0], gaps
    )


def test_loose_bits_are_a_stream():
    raw = integers.pack_bits(np.array([5, 1, 0, 9], np.uint64), np.array([3, 1, 0, 4]))
    assert raw == bytes([0b1001_1_101])
    assert integers.unpack_bits(memoryview(raw), np.array([3, 1, 0, 4]))[0].tolist() == [5, 1, 0, 9]


@pytest.mark.parametrize("raw", [b"", b"\x50\x01\x01", b"\x00\x05\x01", b"\x00\x01\x03"])
def test_what_is_no_golomb_rice_is_refused(raw):
    with pytest.raises(ValueError):
        integers.decode_rice(memoryview(raw), 1)
