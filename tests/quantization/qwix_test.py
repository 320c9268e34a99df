"""Integers, small floats and nf4 of qwix."""

import numpy as np
import pytest

from jaxopt_compress.numerics.codebooks import NF4
from jaxopt_compress.numerics.formats import FORMATS
from tests.quantization.oracles import (
    absmax,
    answers,
    assert_equal_values,
    matrix,
    off_ties,
    on_grid,
    ours,
    values,
    wide,
)

pytestmark = pytest.mark.xdist_group("quantization_oracles")


QWIX_INTEGERS = [f"int{bits}_channel" for bits in range(2, 9)]
QWIX_INTEGERS += ["int4_group32", "int8_group32"]


@pytest.mark.parametrize("case", QWIX_INTEGERS)
def test_integers_of_qwix(case):
    name, group = case.split("_")
    want, x = answers("qwix")[case], matrix()
    assert_equal_values(on_grid(name, x, want["scale"]), want["codes"])
    np.testing.assert_array_equal(values(want["codes"], want["scale"]), want["dequantized"])
    # The other one multiplies by a float32 reciprocal: one unit in the last place.
    scale, _, _ = ours(name, x, group_size=32 if group == "group32" else None)
    np.testing.assert_array_max_ulp(scale, want["scale"], 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 32])
def test_asymmetric_integers_of_qwix(bits, group):
    name = f"int{bits}"
    want, x = answers("qwix")[f"{name}_asymmetric_{'group32' if group else 'channel'}"], matrix()
    np.testing.assert_array_equal(
        values(want["codes"], want["scale"], want["zero"]), want["dequantized"]
    )
    # Elsewhere zero points are added before rounding, so ties beside odd ones go the other way.
    got = on_grid(name, x, want["scale"], want["zero"])
    clear = off_ties(x, want["scale"])
    np.testing.assert_array_equal(got[clear], want["codes"][clear])
    assert np.abs(got - want["codes"]).max() <= 1
    scale, zero, _ = ours(name, x, group_size=group, symmetric=False)
    np.testing.assert_array_max_ulp(scale, want["scale"], 1)
    # Zero points that are ties too, such as where the range is symmetric.
    low = np.minimum(x.reshape(*scale.shape, -1).min(-1), 0)
    clear = off_ties(low, scale)
    np.testing.assert_array_equal(zero[clear], want["zero"][clear])
    assert np.abs(zero - want["zero"]).max() <= 1


QWIX_FLOATS = {
    "float8_e4m3fn_channel": "float8_e4m3fn",
    "float8_e5m2_channel": "float8_e5m2",
    "float4_e2m1fn_group32": "float4_e2m1fn",
    "mxfp8_group32": "mxfp8",
    "mxfp4_group32": "mxfp4",
    "nvfp4_group16": "nvfp4",
}


@pytest.mark.parametrize(("case", "name"), QWIX_FLOATS.items())
def test_floats_of_qwix(case, name):
    want, x = answers("qwix")[case], matrix()
    # Block scales that are too small for e4m3 are zeros there, and their values are lost.
    known = wide(want["scale"] > 0, x.shape)
    got = on_grid(name, x, np.where(want["scale"] > 0, want["scale"], 1))
    assert_equal_values(got[known], want["codes"][known])
    assert_equal_values(values(want["codes"], want["scale"]), want["dequantized"])
    groups = want["scale"].shape[1]
    some = absmax(x, groups) > 0
    if name.startswith("mx"):
        # Theirs is the smallest power of two that clips nothing, ours the one of the standard.
        scale, _, _ = ours(name, x)
        ratio = (want["scale"] / scale)[some]
        top = FORMATS[name].top
        clips = absmax(x, groups)[some] > top * scale[some]
        np.testing.assert_array_equal(ratio, np.where(clips, 2, 1))
    elif name != "nvfp4":
        scale, _, _ = ours(name, x, group_size=32 if "group" in case else None)
        np.testing.assert_array_max_ulp(scale[some], want["scale"][some], 1)


@pytest.mark.parametrize("group", [None, 32])
def test_nf4_of_qwix(group):
    want, x = answers("qwix")[f"nf4_{'group32' if group else 'channel'}"], matrix()
    at = np.float32(NF4.levels)
    got = np.searchsorted(at, on_grid("nf4", x, want["scale"]))
    # The nearest by float32 distance there, by float32 middles here.
    ratio = x * (np.float32(1) / wide(want["scale"], x.shape))
    middle = (at[1:].astype(float) + at[:-1]) / 2
    clear = np.abs(ratio[..., None] - middle).min(-1) > 1e-7
    np.testing.assert_array_equal(got[clear], want["codes"][clear])
    assert np.abs(got - want["codes"]).max() <= 1 and clear.mean() > 0.9
    np.testing.assert_array_equal(values(at[want["codes"]], want["scale"]), want["dequantized"])
    scale, _, _ = ours("nf4", x, group_size=group)
    np.testing.assert_array_max_ulp(scale, want["scale"], 1)
