"""Factors of second moments: against float64, by blocks, and of moments that have none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_compress.numerics.solvers.factor import rolled_cholesky, upper_factor
from tests.numerics.problems import problem, reference_factor


def test_factor_is_that_of_float64():
    _, moment, _ = problem()
    order = np.argsort(-np.diag(moment))
    inverse = reference_factor(moment[order][:, order]) * np.sqrt(np.mean(np.diag(moment)))
    got = np.asarray(upper_factor(jnp.asarray(moment), order=jnp.asarray(order)))
    np.testing.assert_allclose(got, np.linalg.inv(inverse), atol=1e-5)


def test_a_factor_by_blocks_is_the_factor():
    """Stacked, of a size that blocks do not divide; one of the two has no factor."""
    x = np.random.default_rng(0).standard_normal((40, 21))
    h = x.T @ x + np.eye(21)
    both = jnp.asarray([h, h - 20 * np.eye(21)], jnp.float32)
    found = jax.jit(jax.vmap(functools.partial(rolled_cholesky, block=8)))(both)
    np.testing.assert_allclose(found[0], np.linalg.cholesky(h), rtol=0, atol=1e-5)
    assert np.isnan(np.diag(found[1])).any()


@pytest.mark.parametrize("kind", ["zero", "rank one", "one dead", "huge", "tiny", "indefinite"])
def test_factor_is_finite_for_any_moment(kind):
    x = np.random.default_rng(0).standard_normal((1, 12)).astype(np.float32)
    moments = {
        "zero": np.zeros((12, 12)),
        "rank one": x.T @ x,
        "one dead": np.diag(np.arange(12.0)),
        "huge": np.eye(12) * 1e38,
        "tiny": np.eye(12) * 1e-42,
        "indefinite": x.T @ x + np.triu(np.ones((12, 12)), 1) + np.tril(np.ones((12, 12)), -1),
    }
    factor = np.asarray(upper_factor(jnp.asarray(moments[kind], jnp.float32), 1e-6))
    assert np.all(np.isfinite(factor))
    assert np.all(np.diag(factor) > 0)
