"""Matrices as their outputs see them: weighed by second moments of their inputs."""

import functools

import jax
import jax.numpy as jnp

from jaxopt_compress.numerics.solvers.factor import damped_cholesky


@functools.partial(jax.jit, static_argnames="damping")
def outputs_of(w: jax.Array, moment: jax.Array, damping: float = 1e-4) -> jax.Array:
    r"""A matrix :math:`A = L^T W` with :math:`A^T A = W^T (H + \lambda I) W`.

    The Frobenius norm of :math:`L^T D` is the root of the mean square of :math:`x D` for inputs of
    the second moment :math:`H = L L^T - \lambda I`, in units of their root mean square.

    Args:
        w: Floats, ``[*stack, k, n]``.
        moment: :math:`H`, ``[*stack, k, k]``; one that is 0 counts as the identity.
        damping: :math:`\lambda` as a share of the mean diagonal of :math:`H`, above 0. It grows
            where float32 cannot factorize.

    Returns:
        Float32, of the shape of ``w``, finite.

    References:
        Wang et al., 2024, SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language
        Model Compression.
    """
    root = jnp.vectorize(functools.partial(_root, damping=damping), signature="(k,k)->(k,k)")
    lower = root(moment.astype(jnp.float32))
    transposed = jnp.swapaxes(lower, -2, -1)
    return jnp.matmul(transposed, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _root(h: jax.Array, damping: float) -> jax.Array:
    diagonal = jnp.diagonal(h)
    # The mean of quotients: sums of large squares would overflow.
    top = jnp.maximum(jnp.max(diagonal), jnp.finfo(jnp.float32).tiny)
    mean = jnp.mean(diagonal / top)
    eye = jnp.eye(h.shape[0], dtype=h.dtype)
    return damped_cholesky(
        jnp.where(mean > 0, h / top / jnp.where(mean > 0, mean, 1), eye), damping
    )


def weighted_rows(w: jax.Array, weights: jax.Array) -> jax.Array:
    """``w`` with its rows times weights, in units of their mean.

    Args:
        w: Floats, ``[*stack, k, n]``.
        weights: ``[*stack, k]``, at least 0; where all are 0 they count as 1.

    Returns:
        Float32, of the shape of ``w``.

    Example:
        >>> import jax.numpy as jnp
        >>> weighted_rows(jnp.ones((2, 1)), jnp.array([1.0, 3.0]))
        Array([[0.5],
               [1.5]], dtype=float32)
    """
    weights = weights.astype(jnp.float32)
    top = jnp.max(weights, -1, keepdims=True)
    share = jnp.where(top > 0, weights / jnp.where(top > 0, top, 1), 1)
    mean = jnp.mean(share, -1, keepdims=True)
    return w.astype(jnp.float32) * (share / mean)[..., None]
