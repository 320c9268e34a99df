"""Weights with correlated inputs for solvers, and the factor that these begin with in float64."""

import functools

import numpy as np

K, N, ROWS = 200, 48, 1000  # more than one block of rows, the last one not whole


@functools.cache
def problem(seed=0, k=K, n=N):
    """Weights, correlated inputs of which half are held out, and their second moment."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k // 4, k)) / np.sqrt(k // 4)
    x = rng.standard_normal((2 * ROWS, k // 4)) @ mix + 0.3 * rng.standard_normal((2 * ROWS, k))
    x = (x * np.exp(rng.normal(size=k) / 2)).astype(np.float32)
    w = rng.standard_normal((k, n)).astype(np.float32)
    seen = x[:ROWS]
    return w, seen.T @ seen / ROWS, x[ROWS:]


def reference_factor(moment, damping=0.01):
    """The upper factor of the inverse, by the inverse itself."""
    h = moment.astype(np.float64)
    h = h + damping * np.mean(np.diag(h)) * np.eye(len(h))
    return np.linalg.cholesky(np.linalg.inv(h)).T
