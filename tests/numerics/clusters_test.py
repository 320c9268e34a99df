"""k-means: against the exact optimum, against Lloyd's iteration spelled out, and its options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_compress.numerics.clusters import kmeans, nearest


def numbers(seed, members=60):
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(size=members // 2), rng.normal(3, 0.3, members // 2)])
    return x.astype(np.float32), rng.uniform(0.1, 2.0, members).astype(np.float32)


def cost(x, weight, centroids):
    return float(np.sum(weight * np.min((x[:, None] - centroids[None]) ** 2, 1)))


def exact(x, weight, clusters):
    """The least cost, by dynamic programming over where intervals of sorted numbers end."""
    order = np.argsort(x)
    x, weight = x[order].astype(float), weight[order].astype(float)
    mass, first, second = (np.r_[0, np.cumsum(weight * x**p)] for p in range(3))
    n = len(x)
    within = lambda i, j: second[j] - second[i] - (first[j] - first[i]) ** 2 / (mass[j] - mass[i])
    best = [0.0] + [within(0, j) for j in range(1, n + 1)]
    for _ in range(clusters - 1):
        best = [0.0] + [min(best[i] + within(i, j) for i in range(j)) for j in range(1, n + 1)]
    return best[n]


def solved(x, weight, clusters, **how):
    found = kmeans(jnp.asarray(x)[None, :, None], jnp.asarray(weight)[None], clusters, **how)
    return np.asarray(found)[0, :, 0]


@pytest.mark.ci
@pytest.mark.parametrize(
    ("init", "factor"), [("linear", 1.3), ("density", 2), ("kmeans++", 2), ("random", 3)]
)
def test_numbers_come_near_the_optimum_and_stand_still(init, factor):
    """Never below the exact cost, and within a factor: Lloyd's optima are local ones."""
    key = jax.random.key(0) if init in ("kmeans++", "random") else None
    x, weight = numbers(0)
    c = solved(x, weight, 6, init=init, key=key)
    assert np.all(np.diff(c) >= 0)
    assert exact(x, weight, 6) * (1 - 1e-5) <= cost(x, weight, c)
    assert cost(x, weight, c) <= factor * exact(x, weight, 6)
    codes = np.argmin(np.abs(x[:, None] - c), 1)
    means = [np.average(x[codes == k], weights=weight[codes == k]) for k in np.unique(codes)]
    np.testing.assert_allclose(c[np.unique(codes)], means, rtol=1e-4, atol=1e-5)


def test_books_are_problems_of_their_own():
    """Of other scales, with members that count for nothing; each as if it were alone."""
    x, weight = numbers(1)
    weight[::3] = 0
    both = np.stack([x, -1000 * x])
    found = kmeans(jnp.asarray(both)[..., None], jnp.asarray(np.stack([weight] * 2)), 6)
    alone = solved(x, weight, 6)
    np.testing.assert_allclose(found[0, :, 0], alone, rtol=1e-5)
    np.testing.assert_allclose(found[1, ::-1, 0], -1000 * alone, rtol=1e-4, atol=1e-3)
    kept = weight > 0
    np.testing.assert_allclose(solved(x[kept], weight[kept], 6), alone, rtol=1e-5)


def test_a_centroid_that_is_zero_stays_first():
    x, weight = numbers(2)
    x[:5] = 0
    c = solved(x, weight, 6, zero=True)
    assert c[0] == 0 and np.all(np.diff(c[1:]) > 0)
    members, books = jnp.asarray(x)[None, :, None], jnp.asarray(c)[None, :, None]
    codes = np.asarray(nearest(members, books, zero=True))[0]
    assert not codes[:5].any()
    np.testing.assert_array_equal(np.abs(x - c[codes]), np.abs(x[:, None] - c).min(1))


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_no_draw_leaves_one_side_at_zero(init):
    """Of three centroids one is 0, and half of all draws would have both others on one side."""
    x = np.random.default_rng(3).normal(size=500).astype(np.float32)
    weight = np.ones_like(x)
    for seed in range(8):
        c = solved(x, weight, 3, init=init, key=jax.random.key(seed), zero=True)
        assert c[1] < 0 < c[2]
        # With one side at 0 it would be half of all squares and more.
        assert cost(x, weight, c) < 0.3 * float(np.sum(x**2))
    # Where all are on one side there is nothing to mend.
    assert (solved(np.abs(x), weight, 3, init=init, key=jax.random.key(0), zero=True) >= 0).all()


def test_vectors_against_scikit_learn():
    """The same start, so the same local optimum."""
    cluster = pytest.importorskip("sklearn.cluster")
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(80, 3)) + rng.integers(0, 3, (80, 1)) * 2).astype(np.float32)
    weight = rng.uniform(0.5, 2.0, 80).astype(np.float32)
    own = lambda n: kmeans(
        jnp.asarray(x)[None], jnp.asarray(weight)[None], 5, "density", None, False, n
    )
    start = np.asarray(own(0))[0]
    model = cluster.KMeans(5, init=start, n_init=1, max_iter=50, tol=0, algorithm="lloyd")
    model.fit(x, sample_weight=weight)
    found = own(50)
    np.testing.assert_allclose(found[0], model.cluster_centers_, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(nearest(jnp.asarray(x)[None], found)[0], model.labels_)


def test_vectors_far_from_zero():
    """Of a common offset only float32's rounding of the members is left, not their distances."""
    rng = np.random.default_rng(5)
    x = (rng.normal(size=(1, 200, 4)) + 4096).astype(np.float32)
    c = (rng.normal(size=(1, 16, 4)) + 4096).astype(np.float32)
    want = np.argmin(np.sum((x[0, :, None].astype(float) - c) ** 2, -1), 1)
    np.testing.assert_array_equal(nearest(jnp.asarray(x), jnp.asarray(c))[0], want)


def test_sums_beyond_what_float32_counts():
    """After 2^25 in units of the last members, those still have their mean."""
    x = np.r_[np.zeros(8192), np.arange(10, 15)].astype(np.float32)
    weight = np.r_[np.full(8192, 4096), np.ones(5)].astype(np.float32)
    np.testing.assert_array_equal(solved(x, weight, 2), [0, 12])
