"""Products with quantized weights of many kinds, and a float64 oracle for them.

`POOL` is what the forms of `jaxopt_compress.kernels` are tested on, step by step on CPUs and by
`on_gpu.py` on a GPU.
"""

import functools
import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxopt_compress.kernels import How, Operand, Stored
from jaxopt_compress.kernels.case import Case
from jaxopt_compress.numerics.codes import encode, levels_of
from jaxopt_compress.numerics.formats import format_of
from jaxopt_compress.numerics.packing import pack

ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


class Spec(NamedTuple):
    """A product, by its types."""

    format: str = "int8"
    group: int | None = None
    zero: bool = False
    x: str = "float32"
    rows: int = 3
    depth: int = 512
    columns: int = 256
    batch: tuple = ()
    one_column: bool = False
    words: bool = False
    scale: str = "float32"
    sums: str | None = None
    held: str = ""  # "", "matrix", "transposed", or "stack"
    lies: bool = False
    own: bool = False  # a scale per row


INTEGERS = ["int8", "int4", "uint4"]
POOL = [
    *(Spec(*s) for s in itertools.product(["int8", "int4", "uint8"], [None, 32], [False, True])),
    *(Spec(f, g, x=x, rows=r) for f, g, x, r in itertools.product(
        ["int8", "nf4", "float8_e4m3fn"], [None, 128], ["bfloat16", "float16"], [1, 40])),
    *(Spec(f, g, x="bfloat16", batch=(2,), rows=r, depth=64, columns=24, one_column=o)
      for f, g, r, o in itertools.product(["int8", "uint4"], [None, 16], [1, 300], [False, True])),
    *(Spec(f, g, z, words=True, x=x, rows=r) for f, g, z, x, r in itertools.product(
        ["int2", "int4", "int1"], [None, 32], [False, True], ["float32", "bfloat16"], [1, 70])),
    *(Spec(f, None, x="bfloat16", scale=s, sums="bfloat16", words=w)
      for f, s, w in [("int8", "bfloat16", False), ("int8", "float32", False),
                      ("int2", "float32", True)]),
    *(Spec(f, g, z, x="bfloat16", rows=r, held=h, words=w) for f, g, z, w in [
        ("nf4", 128, False, False), ("uint4", 128, True, False), ("int4", 64, False, True),
        ("int4", None, False, False), ("nf4", None, False, False)]
      for r in (1, 40) for h in ("matrix", "transposed", "stack")),
    Spec("int8", lies=True), Spec("uint8", zero=True, lies=True, x="bfloat16"),
    Spec("nf4", x="bfloat16", lies=True, held="transposed"),
    Spec("uint8", zero=True, x="bfloat16", lies=True, held="transposed"),
    # Weights that CPUs read block by block.
    Spec("int8", depth=1024, columns=1024, rows=300), Spec("int4", 64, depth=1024, columns=640),
    *(Spec(f, g, z, x=k, rows=r, own=o) for f, g, z, k, r, o in itertools.product(
        INTEGERS, [None, 128], [False, True], ["int8"], [1, 40], [False, True])),
    *(Spec("int8", g, x="int8", rows=3, batch=(2,), depth=64, columns=24) for g in (None, 16)),
    Spec("int8", 2, x="int8", depth=64, columns=24, rows=40),
    Spec("int8", x="int8", sums="bfloat16"), Spec("int8", x="int8", depth=1024, columns=640),
    Spec("int4", x="int8", depth=1024, columns=512),
    *(Spec("int8", g, x="int8", depth=2 * 2**17, columns=2, rows=2) for g in (None, 2**17)),
    *(Spec(f, g, x="int8", rows=40, held=h, own=True) for f, g, h in itertools.product(
        ["int4", "int8"], [None, 128], ["matrix", "transposed", "stack"])),
    *(Spec("float8_e4m3fn", x="float8_e4m3fn", rows=r, held=h)
      for r, h in itertools.product([1, 40, 200], ["", "stack"])),
]  # fmt: skip


@functools.cache
def made(spec):
    """The activation, the operand, a scale per row or None, the product, and magnitudes."""
    rng = np.random.default_rng(0)
    fmt, groups = format_of(spec.format), spec.depth // (spec.group or spec.depth)
    shape = (*spec.batch, spec.depth, spec.columns)
    draws = jnp.asarray(rng.uniform(fmt.grid.low, fmt.grid.high, shape), jnp.float32)
    codes = encode(fmt.grid.round(draws, None), fmt)
    levels = np.asarray(levels_of(codes, fmt), np.float64)
    scales = (*spec.batch, groups, 1 if spec.one_column else spec.columns)
    scale = jnp.asarray(rng.uniform(0.5, 2.0, scales), spec.scale)
    zero = None
    if spec.zero:
        ends = int(fmt.grid.low), int(fmt.grid.high)
        zero = jnp.asarray(rng.integers(*ends, scales, endpoint=True), jnp.int16)
    if spec.x == "int8":
        x = jnp.asarray(rng.integers(-128, 128, (*spec.batch, spec.rows, spec.depth)), jnp.int8)
    else:
        x = jnp.asarray(rng.normal(size=(*spec.batch, spec.rows, spec.depth)), spec.x)
    stored = pack(codes, fmt.bits, -2, spec.group or spec.depth) if spec.words else codes
    w = Operand(
        codes.mT if spec.lies else stored, scale, zero, _held(spec, stored, scale),
        format=spec.format, group=spec.group, block=(spec.group or spec.depth) * spec.words or None,
        transposed=spec.lies,
    )  # fmt: skip
    own = jnp.asarray(rng.uniform(0.5, 2, (*spec.batch, spec.rows, 1)), jnp.float32)
    spread = lambda a: np.repeat(np.asarray(a, np.float64), spec.depth // groups, axis=-2)
    offset, wide = (spread(zero) if spec.zero else 0.0), np.asarray(x, np.float64)
    factor = np.asarray(own, np.float64) if spec.own else 1.0
    want = factor * (wide @ ((levels - offset) * spread(scale)))
    sizes = factor * (np.abs(wide) @ ((np.abs(levels) + np.abs(offset)) * spread(scale)))
    return x, w, own if spec.own else None, want, sizes


def _held(spec, stored, scale):
    if not spec.held:
        return None
    steps = jnp.broadcast_to(scale, (*scale.shape[:-1], spec.columns))
    given = {"block": (spec.group or spec.depth) * spec.words or None}
    if spec.held == "stack":
        others = lambda a: jnp.stack([jnp.zeros_like(a), a, jnp.ones_like(a)])
        return Stored(others(stored), others(steps), None, jnp.int32(1), **given)
    if spec.held == "transposed":
        return Stored(stored.mT, steps.mT, None, None, transposed=True, **given)
    return Stored(stored, steps, None, None, **given)


def how_of(spec, interpret=True):
    """How a product is computed, kernels step by step or not."""
    return How(sums=spec.sums and jnp.dtype(spec.sums), interpret=interpret)


def bound(spec, sizes):
    """Sums of K exact products err by K roundoffs of float32, whole sums of integers by one each.

    Activation, weight and sums may be rounded to the type of the activation besides.
    """
    terms = spec.depth // (spec.group or spec.depth) if spec.x == "int8" else spec.depth
    short = 2 * ROUNDOFF.get(spec.x, 0) if spec.x != "float32" else 0.0
    short += 2 * ROUNDOFF[spec.sums] if spec.sums else 0.0
    return (short + (terms + 8) * 2.0**-24) * sizes


def taken_by(form, most=2, interpret=True):
    """Up to so many products of the pool that a form fits, spread out over it."""
    fits = []
    for spec in POOL:
        case = Case(*made(spec)[:2], how_of(spec, interpret))
        if form.kind == case.kind and form.fits(case):
            fits.append(spec)
    return fits[:: max(len(fits) // most, 1)][:most]
