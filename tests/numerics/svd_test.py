"""Large factors by random projections, against the whole decomposition by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxopt_compress.numerics.svd import balanced_factors

RNG = np.random.default_rng(0)
N, RANK = 512, 32


def matrix(kind):
    """Gaussian entries, or singular values that fall as a power or exponentially."""
    if kind == "gaussian":
        return RNG.standard_normal((N, N)).astype(np.float32)
    u, _, v = np.linalg.svd(RNG.standard_normal((N, N)))
    s = {"power": np.arange(1.0, N + 1) ** -0.7, "exponential": np.exp(-np.arange(N) / 6.0)}[kind]
    return ((u * s) @ v).astype(np.float32)


@pytest.mark.parametrize("kind", ["gaussian", "power", "exponential"])
def test_the_error_is_within_a_hundredth_of_the_least(kind):
    w = matrix(kind)
    u, v = balanced_factors(jnp.asarray(w), RANK)
    s = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    got = np.linalg.norm(w.astype(np.float64) - np.asarray(u, np.float64) @ np.asarray(v))
    # And the rounding of entries to float32.
    assert got < 1.01 * np.sqrt(np.sum(s[RANK:] ** 2)) + 1e-6 * s[0]


def test_projections_follow_a_key():
    w = jnp.asarray(matrix("gaussian"))
    again = [balanced_factors(w, RANK, key=jax.random.key(i))[0] for i in (1, 1, 2)]
    np.testing.assert_array_equal(again[0], again[1])
    assert np.any(np.asarray(again[0]) != np.asarray(again[2]))


@pytest.mark.ci
def test_stacks_are_decomposed_one_by_one():
    w = jnp.asarray(np.stack([matrix("power"), matrix("exponential") * 100]))
    u, v = balanced_factors(w, RANK)
    for a, b, c in zip(w, u, v, strict=True):
        s = np.linalg.svd(a, compute_uv=False)
        assert np.linalg.norm(a - b @ c) < 1.01 * np.sqrt(np.sum(s[RANK:] ** 2)) + 1e-5 * s[0]


@pytest.mark.ci
def test_a_sharded_matrix_is_not_gathered():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    w = jax.device_put(matrix("power"), NamedSharding(mesh, PartitionSpec("x", "y")))
    compiled = jax.jit(balanced_factors, static_argnums=1).lower(w, RANK).compile()
    whole = f"f32[{N},{N}]"
    lines = [line for line in compiled.as_text().splitlines() if " all-gather" in line]
    assert not [line for line in lines if line.split(" = ")[1].startswith(whole)]
    u, v = compiled(w)
    alone = balanced_factors(jnp.asarray(np.asarray(w)), RANK)
    np.testing.assert_allclose(u @ v, alone[0] @ alone[1], atol=1e-3)
