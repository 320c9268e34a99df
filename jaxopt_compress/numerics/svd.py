"""Truncated singular value decompositions of stacks of matrices, whole or by random projections."""

import functools

import jax
import jax.numpy as jnp

# Below, or with more than this share of all directions, LAPACK's decomposition is as fast.
_LARGE, _THIN = 512, 1 / 4
# Products with the matrix and its transpose, in turn, before its directions are read off: the error
# is then within 1% of the least one, also where no direction stands out.
_POWER = 3


def balanced_factors(
    w: jax.Array, rank: int, met: jax.Array | None = None, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    r"""The best approximation of rank ``rank``, each direction shared evenly by both factors.

    .. math:: \hat W = W Q Q^T = \arg\min_{\mathrm{rank}\, r} \lVert M (W - \hat W) \rVert_F

    where the columns of :math:`Q` are the right singular vectors of :math:`A = M W` with the
    largest singular values. So :math:`M` is neither inverted nor needs an inverse. Without it this
    is the nearest matrix of that rank in the Frobenius and the spectral norm.

    Args:
        w: Floats, ``[*stack, m, n]``.
        rank: At most ``min(m, n)``.
        met: ``A``, ``[*stack, k, n]``: ``w`` as what it meets weighs its rows; by default ``w``.
        key: For the projections of large matrices; by default a fixed one.

    Returns:
        ``(u, v)``: ``[*stack, m, rank]`` and ``[*stack, rank, n]``, in the dtype of ``w``.

    References:
        Eckart and Young, 1936, The Approximation of One Matrix by Another of Lower Rank.
    """
    return _balanced(w, w if met is None else met, _key(key), rank=rank)


@functools.partial(jax.jit, static_argnames="rank")
def _balanced(
    w: jax.Array, met: jax.Array, key: jax.Array, rank: int
) -> tuple[jax.Array, jax.Array]:
    scaled, exponent = unit_range(w)
    q = _directions(unit_range(met)[0], rank, key)
    u = _matmul(scaled, q)
    size = jnp.linalg.norm(u, axis=-2, keepdims=True)
    root = jnp.sqrt(size)
    # The root of an even exponent is exact, and no intermediate result overflows.
    half = exponent[..., None] // 2
    u = jnp.ldexp(jnp.where(size > 0, u / jnp.where(size > 0, root, 1), 0), half)
    v = jnp.ldexp(jnp.swapaxes(q * root, -2, -1), half)
    return u.astype(w.dtype), v.astype(w.dtype)


def leading_directions(a: jax.Array, rank: int, key: jax.Array | None = None) -> jax.Array:
    """The leading right singular vectors of matrices, found as in `balanced_factors`.

    Args:
        a: Floats, ``[*stack, m, n]``, of a magnitude whose squares are finite.
        rank: At most ``min(m, n)``.
        key: For the projections of large matrices; by default a fixed one.

    Returns:
        ``[*stack, n, rank]``, with orthonormal columns.
    """
    return _directions(a, rank, _key(key))


def _key(key: jax.Array | None) -> jax.Array:
    return jax.random.key(0) if key is None else key


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _directions(a: jax.Array, rank: int, key: jax.Array) -> jax.Array:
    """The leading right singular vectors ``[*stack, n, rank]`` of ``a``, ``[*stack, k, n]``."""
    small = min(a.shape[-2:])
    width = rank + max(10, rank // 4)
    if small >= _LARGE and width <= _THIN * small:
        return _projected(a, rank, width, key)
    v = jnp.linalg.svd(a, full_matrices=False)[2]
    return jnp.swapaxes(v[..., :rank, :], -2, -1)


def _projected(a: jax.Array, rank: int, width: int, key: jax.Array) -> jax.Array:
    """As `_directions`, from products with ``width`` vectors alone.

    A matrix that is split over devices is never gathered: only bases of ``width`` vectors are.

    References:
        Halko, Martinsson and Tropp, 2011, Finding Structure with Randomness: Probabilistic
        Algorithms for Constructing Approximate Matrix Decompositions.
    """
    turned = jnp.swapaxes(a, -2, -1)
    basis = jax.random.normal(key, (*a.shape[:-2], a.shape[-1], width), a.dtype)
    for _ in range(_POWER):
        basis = _orthonormal(_matmul(turned, _orthonormal(_matmul(a, basis))))
    # The leading vectors of this basis, from a decomposition of width by width entries.
    left, triangle = jnp.linalg.qr(_matmul(a, basis))
    del left
    v = jnp.linalg.svd(triangle, full_matrices=False)[2]
    return _matmul(basis, jnp.swapaxes(v[..., :rank, :], -2, -1))


def _orthonormal(x: jax.Array) -> jax.Array:
    return jnp.linalg.qr(x)[0]


def unit_range(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``w / 2**exponent`` with entries of at most 1, so that sums of their squares stay finite.

    Returns:
        Float32 of the shape of ``w``, and even exponents ``[*stack, 1]``.
    """
    w = w.astype(jnp.float32)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(w), (-2, -1), keepdims=True))
    exponent = exponent + exponent % 2
    return jnp.ldexp(w, -exponent), exponent[..., 0]


@jax.jit
def error_curve(w: jax.Array) -> jax.Array:
    r"""The least relative errors by rank, :math:`\sqrt{\sum_{i>r} s_i^2 / \sum_i s_i^2}`.

    Args:
        w: Floats, ``[*stack, m, n]``.

    Returns:
        Float32 ``[*stack, min(m, n) + 1]``, from rank 0, where it is 1, to the full rank, where it
        is 0; all 0 for a matrix of zeros.

    Example:
        >>> import jax.numpy as jnp
        >>> error_curve(jnp.diag(jnp.array([4.0, 3.0]))).round(3)
        Array([1. , 0.6, 0. ], dtype=float32)
    """
    s = jnp.linalg.svd(unit_range(w)[0], compute_uv=False)
    # From the smallest on, so that no small sum is the difference of two large ones.
    left = jnp.cumsum(jnp.square(s[..., ::-1]), -1)[..., ::-1]
    left = jnp.concatenate([left, jnp.zeros_like(left[..., :1])], -1)
    total = left[..., :1]
    return jnp.sqrt(left / jnp.where(total > 0, total, 1))


def rank_for_error(curve: jax.Array, error: float) -> jax.Array:
    """The smallest rank, at least 1, whose relative error is at most ``error``.

    Args:
        curve: From `error_curve`, ``[*stack, ranks]``.
        error: In ``[0, 1)``.

    Returns:
        int32 of the shape of the stack.
    """
    above = jnp.sum(curve > error, -1, dtype=jnp.int32)
    return jnp.clip(above, 1, curve.shape[-1] - 1)


def rank_for_energy(w: jax.Array, energy: float) -> jax.Array:
    """The smallest rank that keeps a share ``energy`` of the sum of squares, per matrix of a stack.

    Args:
        w: Floats, ``[*stack, m, n]``.
        energy: In ``(0, 1]``.

    Returns:
        int32 of the shape of the stack, at least 1.
    """
    s = jnp.linalg.svd(unit_range(w)[0], compute_uv=False)
    power = jnp.cumsum(jnp.square(s), -1)
    short = jnp.sum(power < energy * power[..., -1:], -1, dtype=jnp.int32)
    return jnp.clip(short + 1, 1, s.shape[-1])
