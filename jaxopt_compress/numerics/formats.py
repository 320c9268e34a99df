"""Number formats: which levels there are, how codes are held, and what shares a step."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxopt_compress.numerics.codebooks import BINARY, NF4, Codebook, odd_integers
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.minifloats import Minifloat

Grid = Integers | Minifloat | Codebook


class Format(NamedTuple):
    """How one parameter's entries are coded, and what its steps are by default.

    Attributes:
        name: Its usual name, such as ``"int4"``.
        bits: Stored bits per code.
        grid: The levels that codes stand for.
        top: The multiple of the step that the largest magnitude is brought to.
        dtype: The dtype that holds one code in memory where codes are not packed.
        packed: Whether codes live in memory as planar uint8 words.
        group: Entries that share a step, or None for a whole channel.
        scale: The dtype that stores steps.
        absmean: Whether the step is the mean magnitude, which nothing bounds: then the
            straight-through derivative is 1 everywhere.
    """

    name: str
    bits: int
    grid: Grid
    top: float
    dtype: np.dtype
    packed: bool = False
    group: int | None = None
    scale: str = "float32"
    absmean: bool = False

    @property
    def has_zero(self) -> bool:
        """Whether 0.0 has a code."""
        return not isinstance(self.grid, Codebook) or 0.0 in self.grid.levels


def _integers(bits: int, signed: bool) -> Format:
    low = -(2 ** (bits - 1)) if signed else 0
    high = low + 2**bits - 1
    name = f"{'' if signed else 'u'}int{bits}"
    native = {4: f"{'' if signed else 'u'}int4", 8: name, 16: name}
    dtype = jnp.dtype(native.get(bits, "int8" if signed else "uint8"))
    return Format(name, bits, Integers(low, high), high + 0.5, dtype, bits not in native)


def _patterns(name: str, bits: int, grid: Grid, **given: Any) -> Format:
    """A format whose codes are bit patterns or positions."""
    given = {"packed": bits != 4, **given}
    return Format(
        name, bits, grid, grid.high, jnp.dtype("uint4" if bits == 4 else "uint8"), **given
    )


E4M3, _E5M2 = Minifloat(4, 3, 448.0), Minifloat(5, 2, 57344.0)
_E2M3, _E3M2, _E2M1 = Minifloat(2, 3, 7.5), Minifloat(3, 2, 28.0), Minifloat(2, 1, 6.0)
_MX = {"group": 32, "scale": "float8_e8m0fnu"}


def _float8(name: str, grid: Minifloat, dtype: str, **given: Any) -> Format:
    return Format(name, 8, grid, grid.high, jnp.dtype(dtype), **given)


def _powers_of_two(bits: int) -> Format:
    bias = 2 ** (bits - 2) - 1
    grid = Minifloat(bits - 1, 0, 2.0 ** (2 ** (bits - 1) - 1 - bias))
    return _patterns(f"pot{bits}", bits, grid)


FORMATS = {
    f.name: f
    for f in (
        *(_integers(bits, True) for bits in (16, 8, 7, 6, 5, 4, 3, 2, 1)),
        *(_integers(bits, False) for bits in (8, 7, 6, 5, 4, 3, 2, 1)),
        Format("ternary", 2, Integers(-1, 1), 1.0, jnp.dtype("int8"), True, absmean=True),
        _patterns("binary", 1, BINARY, absmean=True),
        _float8("float8_e4m3fn", E4M3, "float8_e4m3fn"),
        _float8("float8_e5m2", _E5M2, "float8_e5m2"),
        _patterns("float6_e2m3fn", 6, _E2M3),
        _patterns("float6_e3m2fn", 6, _E3M2),
        _patterns("float4_e2m1fn", 4, _E2M1),
        *map(_powers_of_two, (5, 4, 3)),
        _patterns("nf4", 4, NF4),
        *(_patterns(f"odd{bits}", bits, odd_integers(bits)) for bits in (4, 3, 2)),
        _float8("mxfp8", E4M3, "float8_e4m3fn", **_MX),
        _float8("mxfp8_e5m2", _E5M2, "float8_e5m2", **_MX),
        _patterns("mxfp6", 6, _E2M3, **_MX),
        _patterns("mxfp6_e3m2", 6, _E3M2, **_MX),
        _patterns("mxfp4", 4, _E2M1, **_MX),
        _patterns("nvfp4", 4, _E2M1, group=16, scale="float8_e4m3fn"),
    )
}


def format_of(name: str | Format) -> Format:
    """Looks a format up by its name.

    Raises:
        ValueError: An unknown name, or a format that is none of `FORMATS`; lists those there are.
    """
    if isinstance(name, Format):
        if FORMATS.get(name.name) != name:
            raise ValueError(
                f"a format of one's own, {name.name!r}: stored arrays know theirs by name; there "
                f"are {', '.join(FORMATS)}"
            )
        return name
    if name not in FORMATS:
        raise ValueError(f"unknown number format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]
