"""Truncated singular value decompositions of stacks of matrices."""

import jax
import jax.numpy as jnp


def balanced_factors(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The best approximation of rank ``rank``, its singular values shared by both factors.

    ``w ~ u @ v`` with ``u = U sqrt(S)`` and ``v = sqrt(S) V^T`` of the largest singular values: the
    nearest matrix of that rank in the Frobenius and the spectral norm.

    Args:
        w: Floats, ``[*stack, m, n]``.
        rank: At most ``min(m, n)``.

    Returns:
        ``(u, v)``: ``[*stack, m, rank]`` and ``[*stack, rank, n]``, in the dtype of ``w``.

    References:
        Eckart and Young, 1936, The Approximation of One Matrix by Another of Lower Rank.
    """
    scaled, exponent = _unit_range(w)
    u, s, v = jnp.linalg.svd(scaled, full_matrices=False)
    # Of an even exponent the root is exact, and no singular value overflows on the way.
    root = jnp.ldexp(jnp.sqrt(s[..., :rank]), exponent // 2)
    u, v = u[..., :rank] * root[..., None, :], root[..., :, None] * v[..., :rank, :]
    return u.astype(w.dtype), v.astype(w.dtype)


def _unit_range(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``w / 2**exponent`` with entries of at most 1, so that sums of their squares stay finite.

    Returns:
        Float32 of the shape of ``w``, and even exponents ``[*stack, 1]``.
    """
    w = w.astype(jnp.float32)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(w), (-2, -1), keepdims=True))
    exponent = exponent + exponent % 2
    return jnp.ldexp(w, -exponent), exponent[..., 0]


def rank_for_energy(w: jax.Array, energy: float) -> jax.Array:
    """The smallest rank that keeps a share ``energy`` of the sum of squares, per matrix of a stack.

    Args:
        w: Floats, ``[*stack, m, n]``.
        energy: In ``(0, 1]``.

    Returns:
        int32 of the shape of the stack, at least 1.
    """
    s = jnp.linalg.svd(_unit_range(w)[0], compute_uv=False)
    power = jnp.cumsum(jnp.square(s), -1)
    short = jnp.sum(power < energy * power[..., -1:], -1, dtype=jnp.int32)
    return jnp.clip(short + 1, 1, s.shape[-1])
