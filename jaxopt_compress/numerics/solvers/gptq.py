"""GPTQ: rounding row after row, the rest making up for each error."""

import functools

import jax
import jax.numpy as jnp

from jaxopt_compress.numerics.formats import Format
from jaxopt_compress.numerics.solvers.factor import upper_factor
from jaxopt_compress.numerics.solvers.grids import Grid, per_entry
from jaxopt_compress.numerics.solvers.rows import settle_rows


@functools.partial(jax.jit, static_argnames=("fmt", "act_order"))
def gptq(
    w: jax.Array,
    moment: jax.Array,
    grid: Grid,
    fmt: Format,
    damping: float = 0.01,
    act_order: bool = True,
) -> jax.Array:
    r"""Levels with a small error of products, ``tr(D^T H D)`` with ``D`` the error of ``w``.

    Args:
        w: ``[*stack, k, n]``, of which ``k`` is summed over.
        moment: ``[*stack, k, k]``: ``E[x x^T]`` of what it meets.
        grid: The values that entries may take.
        fmt: The number format.
        damping: The share of the mean diagonal of ``moment`` that is added to the diagonal.
        act_order: Whether inputs with larger squares are rounded earlier, when more of the others
            can still make up for it; else the order is that of the rows.

    Returns:
        Float32 levels of the shape of ``w``, with zero points still added.

    References:
        Frantar et al., 2023, GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
        Transformers.
    """

    def one(w: jax.Array, moment: jax.Array, grid: Grid) -> jax.Array:
        k = w.shape[0]
        order = jnp.arange(k)
        if act_order:
            order = jnp.argsort(-jnp.diagonal(moment), stable=True)
        back = jnp.argsort(order)
        factor = upper_factor(moment, damping, order)
        held = jax.tree.map(lambda x: x[order], grid)
        settle = lambda row, own: own.nearest(row, fmt)
        values, _ = settle_rows(w[order], factor, held, settle)
        return grid.levels(values[back], fmt)

    args = (w.astype(jnp.float32), moment.astype(jnp.float32), grid)
    return per_entry(one, w.ndim - 2)(*args)
