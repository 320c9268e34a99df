"""Formats of bitsandbytes, gguf, ml_dtypes and compressed-tensors."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.numerics.codebooks import NF4
from jaxopt_compress.numerics.formats import FORMATS
from jaxopt_compress.numerics.steps import step_value
from jaxopt_compress.storage.words import from_words, to_words
from tests.quantization.oracles import (
    MX,
    absmax,
    answers,
    assert_equal_values,
    codes_of,
    filled,
    levels_at,
    matrix,
    off_ties,
    on_grid,
    ours,
    patterns,
    unsigned_zeros,
    values,
)

pytestmark = pytest.mark.xdist_group("quantization_oracles")


def test_nf4_of_bitsandbytes():
    """The same table and ties, bit for bit from one end to the other."""
    want, x = answers("bitsandbytes")["nf4"], matrix("bitsandbytes")
    np.testing.assert_array_equal(np.float32(NF4.levels), matrix("bitsandbytes", "table"))
    scale, _, view = ours("nf4", x)
    some = want["absmax"] > 0
    np.testing.assert_array_equal(scale[some, 0], want["absmax"][some])
    codes = codes_of("nf4", on_grid("nf4", x, scale))
    np.testing.assert_array_equal(codes.astype(np.uint8), want["codes"])
    assert_equal_values(view, want["dequantized"])
    # Their second level is a table of 256 signed values around the mean: another form than ours,
    # of which only the codes, made before it, can be compared.
    double = answers("bitsandbytes")["nf4_double"]
    np.testing.assert_array_equal(codes.astype(np.uint8), double["codes"])


GGUF = {"Q8_0": "int8", "Q4_0": "int4", "Q5_0": "int5", "TQ1_0": "ternary", "TQ2_0": "ternary"}


@pytest.mark.parametrize(("case", "name"), GGUF.items())
def test_blocks_of_gguf(case, name):
    """Values on float16 steps, which are negative in some; codes, except on ties.

    Ties go up or away from zero there. Codes are found with the step in float32, before it is
    rounded.
    """
    want = answers("gguf")[case]
    x = matrix("gguf", "x_wide" if case[0] == "T" else "x")
    codes = jnp.asarray(want["codes"].astype(FORMATS[name].dtype))
    half = jnp.asarray(want["scale"].astype(np.float16))
    small = jc.QuantizedArray(codes, half, None, np.dtype(np.float32), name, -1)
    np.testing.assert_array_equal(small.materialize(), want["dequantized"])
    if case[1] == "8":
        step = absmax(x, 1) / np.float32(127)
    elif case[0] == "T":
        step = absmax(x, 1)
    else:
        top = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
        step = top / np.float32(-8 if name == "int4" else -16)
    # Steps that vanish in float16 make codes of zeros there.
    held = np.broadcast_to(want["scale"] != 0, x.shape)
    step = np.where(step == 0, 1, step).astype(np.float32)
    got = on_grid(name, x, step)
    clear = off_ties(x, step) & held
    np.testing.assert_array_equal(got[clear], want["codes"][clear])
    assert np.abs(got - want["codes"])[held].max() <= 1 and clear[held].mean() > 0.4


@pytest.mark.parametrize(("case", "name"), [("Q4_1", "uint4"), ("Q5_1", "uint5")])
def test_blocks_of_gguf_with_a_minimum(case, name):
    """A float offset, which has no exact zero, is another form: its codes are those above it."""
    want, x = answers("gguf")[case], matrix("gguf")
    low = x.min(1, keepdims=True)
    step = (x.max(1, keepdims=True) - low) / np.float32(FORMATS[name].grid.high)
    step = np.where(step == 0, 1, step).astype(np.float32)
    held = np.broadcast_to(want["scale"] != 0, x.shape)
    clear = off_ties(x - low, step) & held
    np.testing.assert_array_equal(on_grid(name, x - low, step)[clear], want["codes"][clear])


def test_mxfp4_of_gguf():
    """The scales and values of the standard; ties go to the smaller magnitude there."""
    want, x = answers("gguf")["MXFP4"], matrix("gguf")
    scale, _, _ = ours("mxfp4", x)
    some = absmax(x, 1) > 0
    bits = np.log2(scale).astype(int) + 127
    np.testing.assert_array_equal(bits[some], want["scale_bits"][some])
    codes = patterns("mxfp4", on_grid("mxfp4", x, scale))
    ratio = np.abs(x) / scale
    clear = ~np.isin(ratio, [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    np.testing.assert_array_equal(codes[clear], want["codes"][clear])
    levels = levels_at("mxfp4", want["codes"])
    assert_equal_values(values(levels, scale), want["dequantized"])


@pytest.mark.parametrize("name", MX)
def test_small_floats_of_ml_dtypes(name):
    want, grid = answers("ml_dtypes")[name], FORMATS[name].grid
    table = want["table"]
    rounded = lambda x: np.asarray(grid.round(filled(x)))[: len(x)]
    got = np.asarray(grid.decode(filled(np.arange(len(table), dtype=np.uint8))))[: len(table)]
    finite = np.isfinite(table)
    assert got[finite].tobytes() == table[finite].tobytes()
    held = np.isfinite(want["rounded"])
    assert_equal_values(rounded(want["x"])[held], want["rounded"][held])
    codes = np.asarray(grid.encode(filled(rounded(want["x"]))))[: len(held)]
    same = unsigned_zeros(name, want["bits"])
    np.testing.assert_array_equal(codes[held], same[held])
    # Beyond the maximum there are NaN and infinity there, and the maximum here.
    limits = answers("ml_dtypes")[f"{name}_limits"]
    finite = np.isfinite(limits["x"])
    want = np.clip(limits["x"], grid.low, grid.high)[finite]
    assert_equal_values(rounded(limits["x"])[finite], want)


def test_powers_of_two_of_ml_dtypes():
    table = answers("ml_dtypes")["float8_e8m0fnu"]["table"]
    bits = jnp.arange(1, 255).astype(jnp.uint8)
    np.testing.assert_array_equal(step_value(bits.view(jnp.float8_e8m0fnu)), table[1:255])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("axis", [0, 1])
def test_streams_of_compressed_tensors(bits, axis):
    """Of codes shifted to be positive, files hold the same stream of bits, without its padding."""
    want = answers("compressed_tensors")[f"int{bits}"]
    codes = want["codes"][:8] if axis == 0 else want["codes"]
    shifted = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    words = to_words(shifted, bits, axis - 2)
    stream = np.moveaxis(want[f"packed_axis{axis}"], axis, -1)
    stream = np.ascontiguousarray(stream).view(np.uint8)
    stream = np.moveaxis(stream[..., : words.shape[axis]], -1, axis)
    np.testing.assert_array_equal(words, stream)
    back = from_words(words, bits, axis - 2, codes.shape, np.dtype(np.uint8))
    np.testing.assert_array_equal(back, shifted)
