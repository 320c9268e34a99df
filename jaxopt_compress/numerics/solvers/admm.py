"""Entries that are kept under a fixed mask, moved so that products change least."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve

from jaxopt_compress.numerics.solvers.factor import conditioned
from jaxopt_compress.numerics.solvers.grids import per_entry

_dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames="rounds")
def admm(
    w: jax.Array, moment: jax.Array, mask: jax.Array, rounds: int = 20, damping: float = 0.01
) -> jax.Array:
    r"""Least squares under a mask, by the alternating direction method of multipliers.

    .. math:: \min_{\hat W} \mathrm{tr}(D^T H D), \qquad D = \hat W - W, \quad
        \hat W = M \odot \hat W

    With :math:`H` scaled to a diagonal of ones, one inverse serves all rounds and columns:

    .. math::
        V &\leftarrow (H + I)^{-1} (H W + Z - U) \\
        Z &\leftarrow M \odot (V + U), \qquad U \leftarrow U + V - Z

    A column whose error would grow, which few rounds can do, stays as it was under the mask.

    Args:
        w: ``[*stack, k, n]``, of which ``k`` is summed over; whole, not only under the mask.
        moment: ``[*stack, k, k]``: ``E[x x^T]`` of what it meets.
        mask: Booleans of the shape of ``w``, true where an entry is kept.
        rounds: How many; 20 are usual.
        damping: The share of its mean diagonal that is added to the diagonal of :math:`H`.

    Returns:
        Float32 of the shape of ``w``, 0 where nothing is kept.

    Example:
        >>> import jax.numpy as jnp
        >>> w, moment = jnp.array([[1.0], [1.0]]), jnp.array([[1.0, 0.5], [0.5, 1.0]])
        >>> admm(w, moment, jnp.array([[True], [False]]), damping=1e-6).round(2)
        Array([[1.5],
               [0. ]], dtype=float32)

    References:
        Boža, 2024, Fast and Effective Weight Update for Pruned Large Language Models.
    """

    def one(w: jax.Array, moment: jax.Array, mask: jax.Array) -> jax.Array:
        h = conditioned(moment)
        h = h + damping * jnp.eye(h.shape[0], dtype=h.dtype)
        norm = jnp.sqrt(jnp.diagonal(h))[:, None]
        h, w = h / norm / norm.T, w * norm
        eye = jnp.eye(h.shape[0], dtype=h.dtype)
        # Its condition is at most k + 1, so that the inverse is safe, and rounds are products.
        inverse = cho_solve((jnp.linalg.cholesky(h + eye), True), eye)
        target, start = _dot(h, w), jnp.where(mask, w, 0)

        def step(_, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            z, u = carry
            v = _dot(inverse, target + z - u)
            z = jnp.where(mask, v + u, 0)
            return z, u + v - z

        found, _ = lax.fori_loop(0, rounds, step, (start, jnp.zeros_like(w)))
        error = lambda d: jnp.sum(d * _dot(h, d), 0)
        return jnp.where(error(found - w) < error(start - w), found, start) / norm

    args = (w.astype(jnp.float32), moment.astype(jnp.float32), mask)
    return per_entry(one, w.ndim - 2)(*args)
