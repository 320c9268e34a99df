"""Truncated singular value decompositions of stacks of matrices."""

import jax
import jax.numpy as jnp


def balanced_factors(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The best approximation of rank ``rank``, its singular values shared by both factors.

    ``w ~ u @ v`` with ``u = U sqrt(S)`` and ``v = sqrt(S) V^T`` of the largest singular values, which
    is the nearest matrix of that rank in the Frobenius and the spectral norm.

    Args:
        w: Floats, ``[*stack, m, n]``.
        rank: At most ``min(m, n)``.

    Returns:
        ``(u, v)``: ``[*stack, m, rank]`` and ``[*stack, rank, n]``, in the dtype of ``w``.

    References:
        Eckart and Young, 1936, The Approximation of One Matrix by Another of Lower Rank.
    """
    u, s, v = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    u, v = u[..., :rank] * root[..., None, :], root[..., :, None] * v[..., :rank, :]
    return u.astype(w.dtype), v.astype(w.dtype)


def rank_for_energy(w: jax.Array, energy: float) -> jax.Array:
    """The smallest rank that keeps a share ``energy`` of the sum of squares, per matrix of a stack.

    Args:
        w: Floats, ``[*stack, m, n]``.
        energy: In ``(0, 1]``.

    Returns:
        int32 of the shape of the stack, at least 1.
    """
    s = jnp.linalg.svd(w.astype(jnp.float32), compute_uv=False)
    power = jnp.cumsum(jnp.square(s), -1)
    short = jnp.sum(power < energy * power[..., -1:], -1, dtype=jnp.int32)
    return jnp.clip(short + 1, 1, s.shape[-1])
