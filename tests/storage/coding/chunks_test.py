import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxopt_compress.arrays.fields import Distances, Packing
from jaxopt_compress.numerics.packing import pack, pack_mask
from jaxopt_compress.numerics.sparse import gaps_of
from jaxopt_compress.storage.coding import blocks, chunks

NAMES = [name for name in blocks.CODINGS if name]
NATIVE = (
    "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64 complex64"
).split()


def native(part, signed=None):
    signed = part.dtype.kind == "i" if signed is None else signed
    return chunks.Form(part.shape, part.dtype, None, None, part.shape, signed)


def check(part, form, packing, coding):
    raw = chunks.encode(part, form, packing, coding)
    found = chunks.decode(raw, form)
    assert (found.dtype, found.shape) == (part.dtype, part.shape)
    assert found.tobytes() == part.tobytes()
    assert len(raw) <= part.nbytes + 8
    return raw


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(NATIVE), st.binary(min_size=1, max_size=200), st.sampled_from(NAMES))
def test_arrays_of_every_dtype_come_back(dtype, content, coding):
    dtype = np.dtype(dtype)
    raw = np.frombuffer(content * dtype.itemsize, np.uint8)
    part = (raw & 1).astype(bool) if dtype.kind == "b" else raw.view(dtype).reshape(1, -1)
    check(part, native(part), None, coding)


def masks(kept):
    mask = np.random.default_rng(0).random((64, 256)) < kept
    return np.asarray(pack_mask(jnp.asarray(mask), -1)), mask


@pytest.mark.parametrize("coding", NAMES)
@pytest.mark.parametrize("kept", [0.0, 0.002, 0.3, 1.0])
def test_masks_take_no_more_than_their_entropy(kept, coding):
    words, mask = masks(kept)
    raw = check(words, native(words), Packing(1, -1, 8), coding)
    p = np.clip(mask.mean(), 1e-9, 1 - 1e-9)
    entropy = -mask.size * (p * np.log2(p) + (1 - p) * np.log2(1 - p)) / 8
    if coding == "ans":
        assert len(raw) < 1.01 * entropy + 64


@pytest.mark.parametrize("coding", NAMES)
def test_words_of_three_bits_are_coded_by_their_codes(coding):
    codes = np.clip(np.rint(np.random.default_rng(0).normal(size=(64, 64))), -4, 3).astype(np.int8)
    words = np.asarray(pack(jnp.asarray(codes), 3, -2, 32))
    raw = check(words, native(words), Packing(3, -2, 32), coding)
    counts = np.unique(codes, return_counts=True)[1] / codes.size
    entropy = -codes.size * (counts * np.log2(counts)).sum() / 8
    if coding == "ans":
        assert len(raw) < 1.01 * entropy + 64


def test_rank_0_and_gaps_of_wide_integers():
    part = np.array(3.5, np.float32)
    check(part, native(part), None, "ans")
    gaps = np.random.default_rng(0).geometric(0.004, (1, 3000)).astype(np.uint16)
    raw = check(gaps, native(gaps), None, "ans")
    # A plain array takes 16 bits each, the entropy is 9.4.
    assert len(raw) * 8 / gaps.size < 9.6


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["uint8", "int16", "float32"]))
def test_what_is_no_chunk_is_refused(content, dtype):
    form = native(np.zeros((5, 8), dtype))
    try:
        assert chunks.decode(content, form).shape == (5, 8)
    except ValueError:
        pass


@pytest.mark.parametrize("rows", [(), (3,)])
def test_distances_as_a_mask(rows):
    """Rows that keep fewer than the fullest are filled up beyond their end, as they were."""
    rng = np.random.default_rng(5)
    mask = rng.random((*rows, 400)) < 0.05 * np.linspace(0.2, 2, 400)
    gaps = gaps_of(mask, int(mask.sum(-1).max())).astype(np.uint8)
    form = chunks.Form(gaps.shape, gaps.dtype, None, None, gaps.shape, False)
    raw = chunks.encode(gaps, form, Distances(400, 20), "context")
    np.testing.assert_array_equal(chunks.decode(raw, form), gaps)
    assert raw[0] == 8 or len(raw) <= len(chunks.encode(gaps, form, None, "context"))
    # A last entry that no mask says stays what it was.
    other = gaps + np.uint8(100)
    raw = chunks.encode(other, form, Distances(400, 20), "context")
    np.testing.assert_array_equal(chunks.decode(raw, form), other)
