import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import stats

from jaxopt_compress.storage.coding import tables


def shares(table):
    full = np.zeros(256)
    full[table.low : table.low + len(table.weights)] = table.weights
    return full / full.sum()


@pytest.mark.parametrize("size", [300, 3_000, 1_000_000])
@pytest.mark.parametrize("kind", ["normal", "peaked", "narrow", "flat"])
def test_a_table_costs_little_beside_the_entropy(kind, size):
    rng = np.random.default_rng(0)
    scale = {"normal": 30, "peaked": 20, "narrow": 2, "flat": 1}[kind]
    x = np.clip(np.rint(rng.normal(size=size) * scale), -127, 127).astype(int) + 128
    if kind == "peaked":
        x[rng.random(size) < 0.8] = 128
    if kind == "flat":
        x = rng.integers(0, 256, size)
    counts = np.bincount(x, minlength=256)
    table = tables.fit(counts)
    ideal = size * stats.entropy(counts, base=2) / 8
    used = -(counts * np.log2(np.maximum(shares(table), 2.0**-24))).sum() / 8 + len(table.raw)
    assert ideal < used < 1.01 * ideal + 64 or used > size  # The latter are stored as they are.
    assert tables.cost(counts, table) == pytest.approx(used)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**20), min_size=256, max_size=256))
def test_a_table_is_what_its_bytes_say(counts):
    counts = np.array(counts)
    if np.count_nonzero(counts) < 2:
        counts[[3, 200]] = 1
    table = tables.fit(counts)
    again, used = tables.read(table.raw + b"more")
    assert used == len(table.raw) and again.low == table.low
    np.testing.assert_array_equal(again.weights, table.weights)
    assert again.weights.dtype == np.int64


@pytest.mark.parametrize(
    "raw", [b"", b"\0\3\0", b"\0\3\0\0\1\1", b"\xff\3\0\0" + b"\1" * 9, b"\0\3\x09\0" + b"\1" * 9]
)
def test_what_is_no_table_is_refused(raw):
    with pytest.raises(ValueError, match="table of frequencies"):
        tables.read(raw)
