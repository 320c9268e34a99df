"""Matrices as the sum of one of low rank and a sparse one."""

import functools

import jax
import jax.numpy as jnp

from jaxopt_compress.numerics.svd import balanced_factors, unit_range
from jaxopt_compress.numerics.thresholds import largest_mask


@functools.partial(jax.jit, static_argnames=("rank", "keep", "rounds"))
def go_dec(
    w: jax.Array, rank: int, keep: int, rounds: int = 10, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Alternates between the best factors of what entries leave, and the best entries.

    .. math:: \min \lVert W - U V - S \rVert_F \quad \text{with} \quad \mathrm{rank}(U V) \le r,
        \quad \lVert S \rVert_0 \le k

    No round makes the error larger.

    Args:
        w: Floats, ``[*stack, m, n]``.
        rank: :math:`r`.
        keep: :math:`k`, entries of each matrix of a stack.
        rounds: How often both are renewed.
        key: As in `balanced_factors`.

    Returns:
        ``(u, v, mask)``: factors as of `balanced_factors`, and booleans of the shape of ``w``: the
        entries in which ``w - u @ v`` is the sparse matrix.

    References:
        Zhou and Tao, 2011, GoDec: Randomized Low-rank and Sparse Matrix Decomposition in Noisy
        Case.
    """
    wide, exponent = unit_range(w)
    half = exponent[..., None] // 2

    def rest(sparse: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        u, v = balanced_factors(wide - sparse, rank, key=key)
        return u, v, wide - _product(u, v)

    def step(sparse: jax.Array, _: None) -> tuple[jax.Array, None]:
        left = rest(sparse)[2]
        return jnp.where(_largest(left, keep), left, 0), None

    sparse, _ = jax.lax.scan(step, jnp.zeros_like(wide), None, length=rounds)
    u, v, left = rest(sparse)
    u, v = (jnp.ldexp(x, half).astype(w.dtype) for x in (u, v))
    return u, v, _largest(left, keep)


def _largest(x: jax.Array, keep: int) -> jax.Array:
    return largest_mask(jnp.abs(x), keep, stack_ndim=x.ndim - 2)


def _product(u: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.matmul(u, v, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames="rounds")
def robust_pca(w: jax.Array, rounds: int = 60) -> tuple[jax.Array, jax.Array]:
    r"""Principal component pursuit: rank and sparsity follow from the matrix.

    .. math:: \min_{L + S = W} \lVert L \rVert_* + \lambda \lVert S \rVert_1,
        \qquad \lambda = 1 / \sqrt{\max(m, n)}

    by augmented Lagrangians. If ``w`` is the sum of a matrix of low rank whose singular vectors are
    spread out and of a few entries at random places, both are found exactly.

    Args:
        w: Floats, ``[m, n]``.
        rounds: Steps, each with one singular value decomposition.

    Returns:
        ``(l, s)``, float32.

    References:
        Candès et al., 2011, Robust Principal Component Analysis? Lin et al., 2010, The Augmented
        Lagrange Multiplier Method for Exact Recovery of Corrupted Low-Rank Matrices.
    """
    wide = w.astype(jnp.float32)
    weight = 1 / jnp.sqrt(jnp.float32(max(w.shape)))
    norm = jnp.linalg.norm(wide, 2)
    norm = jnp.where(norm > 0, norm, 1)
    dual = wide / jnp.maximum(norm, jnp.max(jnp.abs(wide)) / weight)

    def step(state: tuple[jax.Array, ...], _: None) -> tuple[tuple[jax.Array, ...], None]:
        sparse, dual, mu = state[1:]
        u, s, v = jnp.linalg.svd(wide - sparse + dual / mu, full_matrices=False)
        low = _product(u * jnp.maximum(s - 1 / mu, 0), v)
        left = wide - low + dual / mu
        sparse = jnp.sign(left) * jnp.maximum(jnp.abs(left) - weight / mu, 0)
        dual = dual + mu * (wide - low - sparse)
        return (low, sparse, dual, jnp.minimum(1.5 * mu, 1e7 / norm)), None

    start = (jnp.zeros_like(wide), jnp.zeros_like(wide), dual, 1.25 / norm)
    (low, sparse, _, _), _ = jax.lax.scan(step, start, None, length=rounds)
    return low, sparse
