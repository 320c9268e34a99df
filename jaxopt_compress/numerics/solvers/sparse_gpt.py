"""SparseGPT: zeros chosen and made row after row, the rest making up for each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.numerics.patterns import n_m_mask
from jaxopt_compress.numerics.solvers.factor import upper_factor
from jaxopt_compress.numerics.solvers.grids import per_entry
from jaxopt_compress.numerics.solvers.rows import settle_rows
from jaxopt_compress.numerics.thresholds import largest_mask

Pattern = tuple[int, int]


@functools.partial(jax.jit, static_argnames=("sparsity", "pattern", "block"))
def sparse_gpt(
    w: jax.Array,
    moment: jax.Array,
    keep: jax.Array | None,
    sparsity: float,
    pattern: Pattern | None = None,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[jax.Array, jax.Array]:
    r"""Sparse matrices with a small error of products, ``tr(D^T H D)``.

    An entry costs :math:`w_{ij}^2 V_{ii}^2`, with :math:`V` of `upper_factor`; the cheapest
    become 0. They are chosen block by block of rows, in each as many as its share; or, for a
    pattern, in each ``m`` consecutive rows of a column.

    Args:
        w: ``[*stack, k, n]``, of which ``k`` is summed over.
        moment: ``[*stack, k, k]``: ``E[x x^T]`` of what it meets.
        keep: Booleans of the shape of ``w``, false where an entry has to be 0; or None.
        sparsity: The share of zeros.
        pattern: ``(n, m)``: of each ``m`` rows ``n`` entries stay in each column; or None.
        damping: As in `upper_factor`.
        block: Rows among which zeros are chosen together.

    Returns:
        Float32 values and booleans of the shape of ``w``, true where an entry stays.

    References:
        Frantar and Alistarh, 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned in
        One-Shot.
    """
    k, n = w.shape[-2:]
    quota = jnp.asarray(_quota(k, n, sparsity))

    def choose(rows: jax.Array, diagonal: jax.Array, held: tuple[jax.Array, jax.Array]):
        keep, count = held
        score = jnp.where(keep, jnp.square(rows * diagonal[:, None]), 0)
        if pattern is not None:
            return n_m_mask(score, *pattern, 0) & keep, count
        return largest_mask(score, jnp.sum(count)) & keep, count

    def settle(row: jax.Array, held: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.where(held[0], row, 0)

    def one(w: jax.Array, moment: jax.Array, keep: jax.Array):
        factor, held = upper_factor(moment, damping), (keep, quota)
        if pattern is None:
            made = settle_rows(w, factor, held, settle, of_block=choose, block=block)
        else:
            made = settle_rows(w, factor, held, settle, of_step=choose, step=pattern[1])
        return made[0], made[1][0]

    keep = jnp.ones_like(w, bool) if keep is None else keep
    args = (w.astype(jnp.float32), moment.astype(jnp.float32), keep)
    return per_entry(one, w.ndim - 2)(*args)


def _quota(k: int, n: int, sparsity: float) -> np.ndarray:
    """How many entries each row's share is, so that all shares make up the whole."""
    rows = np.arange(k + 1, dtype=np.int64) * n
    return np.diff(rows - np.floor(rows * sparsity + 0.5).astype(np.int64)).astype(np.int32)
