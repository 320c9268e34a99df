import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_compress.numerics.patterns import n_m_exchange, n_m_mask, transposable_mask
from tests.numerics.thresholds_test import DTYPES, LAWS, oracle, random_scores, widened


def n_m_oracle(scores, n, m, axis):
    def line(row):
        groups = [row[i : i + m] for i in range(0, row.size, m)]
        return np.concatenate([oracle(group, n) for group in groups])

    return np.apply_along_axis(line, axis, widened(scores))


def test_n_m_known_answers():
    x = jnp.arange(1.0, 9.0)
    np.testing.assert_array_equal(jnp.where(n_m_mask(x, 2, 4, 0), x, 0), [0, 0, 3, 4, 0, 0, 7, 8])
    scores = jnp.array([[6.0, 5.0, 1.0], [2.0, 3.0, 4.0]])
    mask = n_m_mask(scores.ravel(), 2, 4, 0).reshape(2, 3)
    np.testing.assert_array_equal(mask, [[1, 1, 0], [0, 1, 1]])


@LAWS
@given(st.data())
def test_n_m_keeps_what_a_stable_sort_keeps_in_each_group(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    x = random_scores(data.draw, data.draw(st.sampled_from([(8, 12), (7, 3, 5)])), dtype)
    n, m = data.draw(st.sampled_from([(2, 4), (1, 3), (4, 4), (3, 16)]))
    axis = data.draw(st.sampled_from([0, -1]))
    np.testing.assert_array_equal(n_m_mask(x, n, m, axis), n_m_oracle(x, n, m, axis))


def test_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((50, 9))
        x[10:20] = 1 + np.arange(9) * 2.0**-52
        x[20:22] = 5e-324 * np.arange(9)
        np.testing.assert_array_equal(n_m_mask(x, 2, 4, 1), n_m_oracle(x, 2, 4, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: n_m_mask(jnp.ones(4), 5, 4, 0), ValueError, "5:4"),
        (lambda: n_m_mask(jnp.ones(4), 0, 4, 0), ValueError, "0:4"),
        (lambda: n_m_mask(jnp.ones(4), 2, 4, 1), ValueError, r"axis=1.*\(4,\)"),
        (lambda: n_m_mask(jnp.float32(1), 2, 4, 0), ValueError, "axis=0"),
        (lambda: n_m_mask(jnp.arange(4), 2, 4, 0), TypeError, "int32"),
    ],
)
def test_errors_name_the_value(call, error, message):
    with pytest.raises(error, match=message):
        call()


def transposable_masks():
    """All 90 masks of four by four with two entries in each row and each column."""
    rows = [np.isin(range(4), pair) for pair in itertools.combinations(range(4), 2)]
    found = map(np.stack, itertools.product(rows, repeat=4))
    return np.stack([mask for mask in found if (mask.sum(0) == 2).all()])


@pytest.mark.ci
def test_transposable_masks_hold_both_ways_and_are_near_the_best_sum():
    every = transposable_masks()
    assert len(every) == 90
    x = np.abs(np.random.default_rng(0).standard_normal((3, 40, 24))).astype(np.float32)
    mask = np.asarray(transposable_mask(jnp.asarray(x), 2, 4))
    blocks = lambda a: a.reshape(3, 10, 4, 6, 4).swapaxes(2, 3)
    assert blocks(mask).sum(-1).max() == 2 and blocks(mask).sum(-2).max() == 2
    best = np.einsum("sabij,kij->sabk", blocks(x), every).max(-1)
    own = blocks(np.where(mask, x, 0)).sum((-1, -2))
    # Half is proven for each block; on the whole little is lost.
    assert (own >= best / 2).all() and own.sum() > 0.96 * best.sum()
    # What is left of a row meets full columns only in few blocks.
    assert blocks(mask).sum((-1, -2)).mean() > 7.5


@pytest.mark.ci
def test_transposable_masks_of_ragged_lengths():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((6, 7)), jnp.float32)
    mask = np.asarray(transposable_mask(x, 2, 4))
    assert mask.shape == x.shape
    assert mask[4:, 4:].all(1).sum() <= 2 and mask[:4, 4:].sum(1).max() <= 2
    for d, length in ((0, 6), (1, 7)):
        starts = range(0, length, 4)
        assert max(mask.take(range(i, min(i + 4, length)), d).sum(d).max() for i in starts) == 2
    # The greatest of all is always there.
    assert mask.ravel()[np.abs(x).argmax()]


@pytest.mark.ci
def test_exchanged_groups_keep_their_counts():
    rng = np.random.default_rng(2)
    x, growth = (rng.standard_normal((5, 10)).astype(np.float32) for _ in range(2))
    old = np.asarray(n_m_mask(jnp.asarray(x), 2, 4, 1))
    args = (jnp.asarray(x * old), jnp.asarray(growth), jnp.asarray(old), jnp.array(True))
    new = np.asarray(n_m_exchange(*args, jnp.int32(1), 2, 4, 1))
    for row, i in itertools.product(range(5), (0, 4)):
        group = slice(i, i + 4)
        kept, score = old[row, group], np.abs(x[row, group])
        weakest = np.where(kept, score, np.inf).argmin()
        grown = np.where(kept, -1, np.abs(growth[row, group])).argmax()
        expected = kept.copy()
        expected[[weakest, grown]] = False, True
        np.testing.assert_array_equal(new[row, group], expected)
    # The ragged last group has nothing to exchange; with 0 nothing changes at all.
    np.testing.assert_array_equal(new[:, 8:], old[:, 8:])
    np.testing.assert_array_equal(n_m_exchange(*args, jnp.int32(0), 2, 4, 1), old)
    # Where all was kept, the pattern comes first.
    everything = (jnp.asarray(x), args[1], jnp.ones_like(args[2]), args[3])
    np.testing.assert_array_equal(n_m_exchange(*everything, jnp.int32(1), 2, 4, 1), old)


def test_no_more_is_exchanged_than_is_kept():
    x = jnp.arange(8.0)
    mask = n_m_exchange(-x, x, x < 2, jnp.array(True), jnp.array(3), 2, 8, 0)
    assert mask.tolist() == [False] * 6 + [True] * 2
