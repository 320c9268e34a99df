"""Tables of levels against a search over all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_compress.numerics.codebooks import BINARY, NF4, Codebook

# Also numbers of levels that are no powers of two.
BOOKS = {
    "nf4": NF4,
    "binary": BINARY,
    "single": Codebook((0.5,)),
    "three": Codebook((-2.0, 0.25, 4.0)),
    "five": Codebook((-1.0, -0.5, 0.0, 1e-3, 7.0)),
}
each = pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)
# All arrays are filled up to one length, so that one program serves all tables.
LENGTH = 256


@functools.cache
def rounding(book):
    return jax.jit(book.round)


def nearest(book, x):
    """The nearest level, the lower one of two equally near, found in float64."""
    at = np.float32(book.levels)
    # A tie is the middle as a float32: the sum of neighbours is exact in float64.
    middle = np.float32((at[:-1].astype(float) + at[1:]) / 2)
    return at[np.searchsorted(middle, x, "left")]


@each
def test_every_code(book):
    codes = np.resize(np.arange(len(book.levels), dtype=np.uint8), LENGTH)
    at = np.float32(book.levels)[codes]
    np.testing.assert_array_equal(book.decode(jnp.asarray(codes)), at)
    got = book.encode(jnp.asarray(at))
    assert got.dtype == jnp.uint8
    np.testing.assert_array_equal(got, codes)
    assert (book.low, book.high, book.signed) == (book.levels[0], book.levels[-1], False)


@each
def test_nearest_around_every_level_and_tie(book):
    at = np.float32(book.levels)
    middle = np.float32((at[:-1].astype(float) + at[1:]) / 2)
    points = np.concatenate([at, middle])
    x = np.concatenate([points, np.nextafter(points, np.inf), np.nextafter(points, -np.inf)])
    x = np.resize(x[(np.abs(x) >= np.finfo(np.float32).tiny) | (x == 0)], LENGTH)
    for round_ in (book.round, rounding(book)):
        np.testing.assert_array_equal(round_(jnp.asarray(x)), nearest(book, x))


@each
@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.floats(-1.25, 1.25, width=32, allow_subnormal=False)
        | st.floats(allow_nan=False, allow_infinity=False, width=32, allow_subnormal=False),
        min_size=16,
        max_size=16,
    ).map(lambda x: np.resize(np.float32(x), LENGTH))
)
def test_nearest_of_any_value(book, x):
    got = np.asarray(rounding(book)(x))
    np.testing.assert_array_equal(got, nearest(book, x))
    distance = np.abs(x.astype(float)[:, None] - np.float32(book.levels)).min(1)
    # The middle of two levels is rounded to float32, and so are those who are nearly there.
    assert (np.abs(got - x.astype(float)) <= distance * (1 + 1e-6) + 1e-7).all()


@each
def test_stochastic_rounding(book):
    at = np.float64(np.float32(book.levels))
    if len(at) == 1:
        return
    rng = np.random.default_rng(0)
    low = rng.integers(len(at) - 1, size=64)
    gap = at[low + 1] - at[low]
    x = np.float32(at[low] + rng.random(64) * gap)
    trials = 512
    noise = np.float32((np.arange(trials) + 0.5) / trials)
    got = np.asarray(rounding(book)(np.tile(x, (trials, 1)), np.tile(noise, (64, 1)).T))
    assert (np.abs(got.astype(float).mean(0) - x) <= gap / trials * 1.01).all()


@pytest.mark.parametrize("noise", [0.0, 1 - 2.0**-23], ids=["least", "most"])
@each
def test_stochastic_rounding_keeps_levels(book, noise):
    at = np.resize(np.float32(book.levels), LENGTH)
    got = book.round(jnp.asarray(at), jnp.full(LENGTH, noise, jnp.float32))
    np.testing.assert_array_equal(got, at)


def test_decode_is_elementwise():
    """No gather: only what fuses into a consumer."""
    jaxpr = jax.make_jaxpr(NF4.decode)(jnp.zeros((4, 4), jnp.uint4))
    names = {eqn.primitive.name for eqn in jaxpr.jaxpr.eqns}
    assert not names & {"gather", "dynamic_slice", "dot_general"}, names


def test_nf4_is_made_of_normal_quantiles():
    """Section 3 of the paper: quantiles of both halves, each from 1 - delta on, and zero."""
    delta = (1 / 32 + 1 / 30) / 2
    up = scipy.stats.norm.ppf(np.linspace(1 - delta, 0.5, 9)[:-1])
    down = -scipy.stats.norm.ppf(np.linspace(1 - delta, 0.5, 8)[:-1])
    want = np.sort(np.concatenate([up, [0], down]))
    want = want / np.abs(want).max()
    # The published digits are those of float32 arithmetic.
    np.testing.assert_allclose(NF4.levels, want, rtol=0, atol=4e-7)
