"""Triangular factors of second moments."""

import jax
import jax.numpy as jnp
from jax import lax

# Each try multiplies the damping by 10: the last one leaves a multiple of the identity.
_TRIES = 12

# XLA unrolls a factorization on TPUs: compiling it takes ten times longer at each doubling.
_UNROLLED = 1024


def conditioned(moment: jax.Array) -> jax.Array:
    """A second moment with a mean diagonal of 1, in which inputs that were never met count as 1.

    Rows and columns of inputs that were always 0 become those of the identity, so that their
    weights are rounded to the nearest. A moment without any input becomes the identity.

    Args:
        moment: ``[k, k]``, symmetric.

    Returns:
        Float32 ``[k, k]``.
    """
    h = moment.astype(jnp.float32)
    diagonal = jnp.diagonal(h)
    alive = diagonal > 0
    count = jnp.maximum(jnp.sum(alive), 1)
    # The mean of quotients: sums of large squares would overflow.
    top = jnp.maximum(jnp.max(diagonal, initial=0), jnp.finfo(jnp.float32).tiny)
    mean = jnp.sum(jnp.where(alive, diagonal / top, 0)) / count
    h = jnp.where(alive[:, None] & alive, h / top / jnp.where(mean > 0, mean, 1), 0)
    return jnp.where(jnp.eye(h.shape[0], dtype=bool) & ~alive, 1, h)


def upper_factor(
    moment: jax.Array, damping: float = 0.01, order: jax.Array | None = None
) -> jax.Array:
    r"""The upper triangular factor of a damped second moment.

    .. math:: V V^T = H + \lambda I, \qquad \lambda = \mathrm{damping} \cdot
        \mathrm{mean}(\mathrm{diag}\, H)

    Its inverse is the factor of :math:`H^{-1}` that the papers of GPTQ and SparseGPT take, and is
    not needed. Where the factorization fails in float32, the damping grows tenfold until it
    succeeds.

    Args:
        moment: ``[k, k]``, symmetric and positive semidefinite.
        damping: Above 0.
        order: ``[k]``: in which order rows and columns are taken; None for their own.

    Returns:
        Float32 ``[k, k]``, finite, of the moment scaled to a mean diagonal of 1.

    Example:
        >>> import jax.numpy as jnp
        >>> upper_factor(jnp.array([[4.0, 2.0], [2.0, 4.0]]), 1e-6).round(2)
        Array([[0.87, 0.5 ],
               [0.  , 1.  ]], dtype=float32)

    References:
        Frantar et al., 2023, GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
        Transformers.
    """
    h = conditioned(moment)
    # A lower factor of the moment in reversed order is an upper one of the moment.
    back = jnp.arange(h.shape[0])[::-1] if order is None else order[::-1]
    lower = damped_cholesky(h[back][:, back], damping)
    return lower[::-1, ::-1]


def damped_cholesky(h: jax.Array, damping: float) -> jax.Array:
    r"""The lower triangular factor of :math:`H + \lambda I`, for the least damping that works.

    Args:
        h: ``[k, k]``, symmetric and positive semidefinite, with a mean diagonal of about 1.
        damping: :math:`\lambda`, above 0. Where float32 cannot factorize, it grows tenfold.

    Returns:
        Float32 ``[k, k]``, finite; the identity if nothing works.
    """
    eye = jnp.eye(h.shape[0], dtype=h.dtype)

    def attempt(state: tuple[jax.Array, jax.Array, jax.Array]):
        damp, _, tries = state
        lower = _cholesky(h + damp * eye)
        return damp * 10, lower, tries + 1

    def failed(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, lower, tries = state
        return ~_is_whole(lower) & (tries < _TRIES)

    # One failure to begin with, so that the factorization is compiled once.
    start = (jnp.asarray(damping, h.dtype), jnp.full_like(h, jnp.nan), jnp.int32(0))
    _, lower, _ = lax.while_loop(failed, attempt, start)
    return jnp.where(_is_whole(lower), lower, eye)


def _cholesky(h: jax.Array) -> jax.Array:
    """The lower triangular factor; NaN on the diagonal where there is none."""
    whole = lambda h: lax.linalg.cholesky(h, symmetrize_input=False)
    if h.shape[0] <= _UNROLLED:
        return whole(h)
    return lax.platform_dependent(h, tpu=rolled_cholesky, default=whole)


def rolled_cholesky(h: jax.Array, block: int = 128) -> jax.Array:
    """The lower triangular factor, by a loop over blocks of columns that compiles once.

    Columns above the diagonal are computed too, and left out: three times the operations.

    Args:
        h: Float32 ``[k, k]``, symmetric and positive definite.
        block: Columns per step.

    Returns:
        Float32 ``[k, k]``; NaN on the diagonal if ``h`` is not positive definite.
    """
    k, fill = h.shape[0], -h.shape[0] % block
    # Rows of the identity behind the last ones make up whole blocks.
    ones = jnp.diag(jnp.arange(k + fill) >= k).astype(h.dtype)
    h = jnp.pad(h, (0, fill)) + ones
    row = jnp.arange(k + fill)[:, None]

    def step(i, lower):
        at = i * block
        done = lax.dynamic_slice_in_dim(lower, at, block, 0)
        due = lax.dynamic_slice_in_dim(h, at, block, 1)
        due = due - jnp.matmul(lower, done.T, precision=lax.Precision.HIGHEST)
        corner = lax.dynamic_slice_in_dim(due, at, block, 0)
        corner = lax.linalg.cholesky(corner, symmetrize_input=False)
        panel = lax.linalg.triangular_solve(
            corner, due, left_side=False, lower=True, transpose_a=True
        )
        panel = jnp.where(row >= at + jnp.arange(block), panel, 0)
        return lax.dynamic_update_slice_in_dim(lower, panel, at, 1)

    return lax.fori_loop(0, (k + fill) // block, step, jnp.zeros_like(h))[:k, :k]


def _is_whole(lower: jax.Array) -> jax.Array:
    """Whether a factorization succeeded: where it fails, its diagonal shows it."""
    return jnp.all(jnp.isfinite(jnp.diagonal(lower)))
