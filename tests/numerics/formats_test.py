"""The table of formats against their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_compress.numerics.formats import FORMATS, format_of

MX = (32, "float8_e8m0fnu")
WHOLE = (None, "float32")
# Name: bits, lowest and highest level, dtype of codes, whether they are packed, group, step dtype.
EXPECTED = {
    **{
        f"int{n}": (n, -(2 ** (n - 1)), 2 ** (n - 1) - 1, "int8", True, *WHOLE)
        for n in (7, 6, 5, 3, 2, 1)
    },
    **{f"uint{n}": (n, 0, 2**n - 1, "uint8", True, *WHOLE) for n in (7, 6, 5, 3, 2, 1)},
    "int4": (4, -8, 7, "int4", False, *WHOLE),
    "uint4": (4, 0, 15, "uint4", False, *WHOLE),
    "int8": (8, -128, 127, "int8", False, *WHOLE),
    "uint8": (8, 0, 255, "uint8", False, *WHOLE),
    "int16": (16, -32768, 32767, "int16", False, *WHOLE),
    "ternary": (2, -1, 1, "int8", True, *WHOLE),
    "binary": (1, -1, 1, "uint8", True, *WHOLE),
    "float8_e4m3fn": (8, -448, 448, "float8_e4m3fn", False, *WHOLE),
    "float8_e5m2": (8, -57344, 57344, "float8_e5m2", False, *WHOLE),
    "float6_e2m3fn": (6, -7.5, 7.5, "uint8", True, *WHOLE),
    "float6_e3m2fn": (6, -28, 28, "uint8", True, *WHOLE),
    "float4_e2m1fn": (4, -6, 6, "uint4", False, *WHOLE),
    "pot5": (5, -256, 256, "uint8", True, *WHOLE),
    "pot4": (4, -16, 16, "uint4", False, *WHOLE),
    "pot3": (3, -4, 4, "uint8", True, *WHOLE),
    "nf4": (4, -1, 1, "uint4", False, *WHOLE),
    "odd4": (4, -15, 15, "uint4", False, *WHOLE),
    "odd3": (3, -7, 7, "uint8", True, *WHOLE),
    "odd2": (2, -3, 3, "uint8", True, *WHOLE),
    "mxfp8": (8, -448, 448, "float8_e4m3fn", False, *MX),
    "mxfp8_e5m2": (8, -57344, 57344, "float8_e5m2", False, *MX),
    "mxfp6": (6, -7.5, 7.5, "uint8", True, *MX),
    "mxfp6_e3m2": (6, -28, 28, "uint8", True, *MX),
    "mxfp4": (4, -6, 6, "uint4", False, *MX),
    "nvfp4": (4, -6, 6, "uint4", False, 16, "float8_e4m3fn"),
}


def test_every_format_is_expected():
    assert set(FORMATS) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_format(name):
    fmt = FORMATS[name]
    bits, low, high, dtype, packed, group, scale = EXPECTED[name]
    assert (fmt.name, fmt.bits, fmt.packed) == (name, bits, packed)
    assert (fmt.grid.low, fmt.grid.high) == (low, high)
    assert fmt.dtype == jnp.dtype(dtype)
    assert (fmt.group, fmt.scale) == (group, scale)
    # Integers reach half a step beyond the highest one; the mean magnitude is a step itself.
    whole = name.startswith(("int", "uint"))
    assert fmt.top == (high + 0.5 if whole else high)
    assert fmt.absmean == (name in ("binary", "ternary"))
    assert fmt.has_zero == (name not in ("binary", "odd2", "odd3", "odd4"))


@pytest.mark.parametrize("name", EXPECTED)
def test_codes_and_levels(name):
    """As many levels as patterns, at most, all of them exact in float32 and within bounds."""
    fmt = FORMATS[name]
    codes = np.arange(2**fmt.bits) - (2 ** (fmt.bits - 1) if fmt.grid.signed else 0)
    levels = np.asarray(fmt.grid.decode(jnp.asarray(codes)))
    assert levels.dtype == np.float32
    used = (levels >= fmt.grid.low) & (levels <= fmt.grid.high)
    distinct = np.unique(levels[used])
    assert distinct[0] == fmt.grid.low and distinct[-1] == fmt.grid.high
    assert (0.0 in distinct) == fmt.has_zero
    # Floats have a second zero, float8 has codes for NaN and infinities, ternary leaves one code.
    unused = {"ternary": 1, "float8_e4m3fn": 3, "mxfp8": 3, "float8_e5m2": 9, "mxfp8_e5m2": 9}
    whole = not name.startswith(("float", "pot", "mx", "nv"))
    assert len(distinct) == 2**fmt.bits - unused.get(name, 0 if whole else 1)


def test_format_of():
    assert format_of("int3") is FORMATS["int3"]
    assert format_of(FORMATS["nf4"]) is FORMATS["nf4"]
    with pytest.raises(
        ValueError, match=r"unknown number format 'int9'; there are int16, int8, .*"
    ):
        format_of("int9")
