"""What tests against independent quantizers share; their answers are in `tests/known_answers`.

For each case: codes on the other one's steps, and values of its codes, bit for bit; and our own
steps, which are equal where the formula is, and otherwise off by what the tests name.
"""

import functools
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxopt_compress as jc
from jaxopt_compress.arrays.quantized import steps_of
from jaxopt_compress.numerics.codes import decode, encode, levels_of, round_to_grid
from jaxopt_compress.numerics.formats import FORMATS

ANSWERS = Path(__file__).parents[1] / "known_answers"


@functools.cache
def answers(file):
    """``{case: {array: values}}``."""
    out = {}
    with np.load(ANSWERS / f"{file}.npz") as arrays:
        for key, value in arrays.items():
            case, _, name = key.rpartition("/")
            out.setdefault(case, {})[name] = value
    return out


def matrix(file="qwix", name="x"):
    return answers(file)[""][name]


def wide(per_group, shape):
    """One value per entry of rows."""
    return np.repeat(per_group, shape[1] // per_group.shape[1], 1)


# All rows are filled up to one shape, so that what is compiled for one case serves all others.
SHAPE = (18, 64)


def filled(x, fill=0):
    """As many entries as `SHAPE` has, in a row."""
    return jnp.asarray(np.append(x, np.full(math.prod(SHAPE) - x.size, fill, x.dtype)))


def per_entry(per_group, shape, fill):
    return filled(np.broadcast_to(wide(np.atleast_2d(per_group), shape), shape).ravel(), fill)


def on_grid(name, x, scale, zero=None):
    """Levels on given steps: floats, the zero point still in them."""
    zero = None if zero is None else per_entry(zero, x.shape, 0)
    scale = per_entry(scale.astype(np.float32), x.shape, 1)
    levels, _ = round_to_grid(filled(x.ravel()), scale, zero, FORMATS[name])
    return np.asarray(levels)[: x.size].reshape(x.shape)


def values(levels, scale, zero=0):
    """What levels on given steps stand for."""
    shape = levels.shape
    levels = levels.astype(np.float32) - wide(np.atleast_2d(zero).astype(np.float32), shape)
    dense = decode(filled(levels.ravel()), per_entry(scale, shape, 1), jnp.float32)
    return np.asarray(dense)[: levels.size].reshape(shape)


def codes_of(name, levels):
    """Codes of levels, as they are held."""
    return np.asarray(encode(filled(levels.ravel()), FORMATS[name]))[: levels.size].reshape(
        levels.shape
    )


def levels_at(name, codes):
    """Levels of bit patterns."""
    levels = levels_of(filled(codes.astype(np.uint8).ravel()), FORMATS[name])
    return np.asarray(levels)[: codes.size].reshape(codes.shape)


def ours(name, x, **given):
    """Our own steps, zero points and view of rows."""
    rows = len(x) * x.shape[1] // SHAPE[1]
    full = np.zeros(SHAPE, np.float32)
    full[:rows] = x.reshape(rows, SHAPE[1])
    c, params = jc.quantize(name, **given), {"w": jnp.asarray(full.T)}
    state = c.init(params)
    leaf = state.leaves["w"]
    scale = steps_of(leaf.scale)
    own = lambda field: np.asarray(field).T[:rows].reshape(len(x), -1)
    zero = None if leaf.zero is None else own(leaf.zero).astype(np.int32)
    return own(scale), zero, own(c.apply(params, state)["w"])


def absmax(x, groups):
    return np.abs(x.reshape(len(x), groups, -1)).max(-1)


def assert_equal_values(got, want):
    """As numbers: zeros have two signs elsewhere."""
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def off_ties(x, scale, shift=0.0):
    """Entries whose ratio lies away from the middle of two integers, by more than roundings."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        ratio = x.astype(float) / wide(scale, x.shape) + shift
    return np.abs(ratio - np.floor(ratio) - 0.5) > 1e-6 * np.maximum(np.abs(ratio), 1)


# Formats of torchao, and ours.
MX = {
    "float8_e4m3fn": "mxfp8",
    "float8_e5m2": "mxfp8_e5m2",
    "float6_e2m3fn": "mxfp6",
    "float6_e3m2fn": "mxfp6_e3m2",
    "float4_e2m1fn": "mxfp4",
}


def patterns(name, levels):
    """Bit patterns of levels."""
    return codes_of(name, levels).view(np.uint8)


def unsigned_zeros(name, bits):
    """Codes with the same one for both zeros."""
    return np.where(bits == 1 << (FORMATS[name].bits - 1), 0, bits)
