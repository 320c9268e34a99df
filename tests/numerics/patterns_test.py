import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_compress.numerics.patterns import n_m_mask
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
