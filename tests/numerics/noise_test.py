"""Hashed noise is as good as random where entries differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_compress.numerics.noise import noise_of

N = 2**16


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((256, 256)),
        np.random.default_rng(0).standard_normal((16, N // 16)),
        np.arange(N),
        # What comes in bfloat16, with few distinct values.
        np.random.default_rng(1).integers(-4, 5, N) / 8,
    ],
    ids=["zeros", "normal", "ascending", "few"],
)
def test_uniform_and_without_pattern(x):
    noise = np.asarray(noise_of(jnp.asarray(x, jnp.float32)), np.float64)
    assert noise.min() >= 0 and noise.max() < 1
    flat = noise.reshape(-1)
    # The statistic of Kolmogorov and Smirnov exceeds 1.95 / sqrt(n) once in a thousand times.
    gap = np.abs(np.sort(flat) - (np.arange(N) + 0.5) / N).max()
    assert gap < 1.95 / N**0.5 + 1 / N
    # Neighbours along each axis, and noise and value: correlations are within 4 / sqrt(n).
    pairs = [
        (np.take(noise, range(1, n), d), np.take(noise, range(n - 1), d))
        for d, n in enumerate(noise.shape)
    ]
    pairs += [(noise, x)] if np.ptp(x) else []
    for a, b in pairs:
        assert abs(np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1]) < 4 / a.size**0.5


def test_local_to_each_entry_and_the_same_in_every_program():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((8, 32)), jnp.float32)
    noise = noise_of(x)
    np.testing.assert_array_equal(jax.jit(noise_of)(x), noise)
    changed = noise_of(x.at[3, 5].add(1)) != noise
    assert changed.sum() == 1 and changed[3, 5]
    assert noise_of(jnp.zeros((0, 3))).shape == (0, 3)
    assert noise_of(jnp.float32(1)).shape == ()
