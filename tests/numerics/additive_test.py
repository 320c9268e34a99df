"""Sums of centroids: against all sums there are, and against k-means alone."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_compress.numerics.additive import nearest_sums, sums_of_centroids
from jaxopt_compress.numerics.clusters import kmeans, nearest

pytestmark = pytest.mark.ci


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_search_finds_nearly_the_nearest_sum():
    """As wide as the first codebook, the beam leaves nothing out of two."""
    x, c = normal(0, 2, 50, 3), normal(1, 2, 2, 4, 3)
    weight = np.random.default_rng(2).uniform(0.1, 2, x.shape).astype(np.float32)
    codes = np.asarray(nearest_sums(*map(jnp.asarray, (x, weight, c))))
    for book in range(2):
        pairs = list(itertools.product(range(4), range(4)))
        sums = np.array([c[book, 0, i] + c[book, 1, j] for i, j in pairs])
        lost = (weight[book, :, None] * (x[book, :, None] - sums) ** 2).sum(-1)
        assert [pairs[k] for k in lost.argmin(1)] == list(map(tuple, codes[book].T))


def test_sums_that_are_there_are_found_and_weights_count():
    """Far fewer values than sums of them: an error near 0; and no member of weight 0 is in it."""
    a, b = np.array([[-8, 8], [8, 8], [0, -8]]), np.array([[1, 0], [-1, 0.5], [0, 1]])
    rng = np.random.default_rng(3)
    at = rng.integers(0, 3, (2, 120))
    x = (a[at[0]] + b[at[1]]).astype(np.float32)[None]
    weight = np.ones_like(x)
    x[:, ::10], weight[:, ::10] = 1.5, 0
    codes, c = map(np.asarray, sums_of_centroids(jnp.asarray(x), jnp.asarray(weight), 3, 2))
    got = c[0, 0][codes[0, 0]] + c[0, 1][codes[0, 1]]
    assert np.sqrt((weight[0] * (got - x[0]) ** 2).mean()) < 0.35


def test_it_is_never_worse_than_residuals():
    x = jnp.asarray(normal(4, 1, 300, 4)) * 1e30
    weight = jnp.ones_like(x)
    codes, c = sums_of_centroids(x, weight, 8, 2)
    error = lambda y: float(jnp.sum(((x[0] - y) * 1e-30) ** 2))
    rest, total = x, 0.0
    for _ in range(2):
        own = kmeans(rest, weight[..., 0], 8, "density")
        part = own[0][nearest(rest, own)[0]]
        rest, total = rest - part, total + part
    assert error(c[0, 0][codes[0, 0]] + c[0, 1][codes[0, 1]]) <= error(total) * (1 + 1e-5)


def test_zeros_find_the_smallest_sum():
    """Magnitudes of centroids count too, or all distances from zeros are infinite."""
    c = jnp.array([[[[3.0, 3.0], [0.01, 0.0]], [[5.0, 5.0], [-0.01, 0.0]]]])
    x = jnp.zeros((1, 3, 2))
    assert nearest_sums(x, jnp.ones_like(x), c)[0].tolist() == [[1, 1, 1], [1, 1, 1]]
