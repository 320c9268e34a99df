"""Matrices settled row after row, each row's error passed on to the rows behind it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Held = Any
Settle = Callable[[jax.Array, Held], jax.Array]
Choose = Callable[[jax.Array, jax.Array, Held], Held]

_dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def settle_rows(
    w: jax.Array,
    factor: jax.Array,
    held: Held,
    settle: Settle,
    *,
    of_block: Choose | None = None,
    of_step: Choose | None = None,
    block: int = 128,
    step: int = 8,
) -> tuple[jax.Array, Held]:
    r"""Replaces each row by one that ``settle`` allows, and corrects the rows behind it.

    Row :math:`i` becomes :math:`q_i`, and its error moves the later ones,

    .. math:: w_j \leftarrow w_j - \frac{U_{ij}}{U_{ii}} (w_i - q_i), \qquad j > i

    which is the best that they can do about it in :math:`\mathrm{tr}(D^T H D)` if they stay free.
    Rows are corrected when their block, and in it their step, is due: two products instead of one
    update of all later rows per row.

    Args:
        w: Float32 ``[k, n]``.
        factor: ``[k, k]``, what `inverse_factor` made.
        held: A pytree of arrays ``[k, ...]`` that belong to rows.
        settle: ``settle(row [n], held row) -> row [n]``.
        of_block: ``of_block(rows, diagonal, held) -> held``: decides for all rows of a block once
            they are corrected for the blocks before it. ``diagonal`` is that of ``factor``.
        of_step: The same for the rows of a step.
        block: Rows per block, about.
        step: Rows per step.

    Returns:
        The settled rows ``[k, n]``, and ``held`` as it was chosen.

    References:
        Frantar and Alistarh, 2022, Optimal Brain Compression. Frantar et al., 2023, GPTQ.
    """
    k = w.shape[0]
    block = min(block // step * step, -(-k // step) * step) if block > step else step
    w, held = (jax.tree.map(functools.partial(_filled, -k % block), x) for x in (w, held))
    factor = jnp.pad(factor, [(0, -k % block)] * 2)
    # Rows that fill up the last block are kept apart from the others by zeros in the factor.
    factor = factor + jnp.diag((jnp.arange(w.shape[0]) >= k).astype(factor.dtype))

    def settle_step(i, carry, rows, corner):
        errors, settled, own = carry
        at = i * step
        due = _rows(rows, at, step) - _dot(_columns(corner, at, step).T, errors)
        mine = jax.tree.map(lambda x: _rows(x, at, step), own)
        small = _columns(_rows(corner, at, step), at, step)
        if of_step is not None:
            mine = of_step(due, jnp.diagonal(small), mine)
            own = jax.tree.map(lambda x, new: _with_rows(x, new, at), own, mine)

        def settle_row(j, carry):
            wrong, made = carry
            row = due[j] - _dot(small[:, j], wrong)
            value = settle(row, jax.tree.map(lambda x: x[j], mine))
            return wrong.at[j].set((row - value) / small[j, j]), made.at[j].set(value)

        blank = jnp.zeros_like(due)
        wrong, made = lax.fori_loop(0, step, settle_row, (blank, blank))
        new = _with_rows(errors, wrong, at), _with_rows(settled, made, at)
        return (*new, own)

    def settle_block(b, carry):
        errors, settled, held = carry
        at = b * block
        columns = _columns(factor, at, block)
        rows = _rows(w, at, block) - _dot(columns.T, errors)
        corner = _rows(columns, at, block)
        own = jax.tree.map(lambda x: _rows(x, at, block), held)
        if of_block is not None:
            own = of_block(rows, jnp.diagonal(corner), own)
        blank = jnp.zeros_like(rows)
        run = functools.partial(settle_step, rows=rows, corner=corner)
        wrong, made, own = lax.fori_loop(0, block // step, run, (blank, blank, own))
        held = jax.tree.map(lambda x, new: _with_rows(x, new, at), held, own)
        return _with_rows(errors, wrong, at), _with_rows(settled, made, at), held

    blank = jnp.zeros_like(w)
    done = lax.fori_loop(0, w.shape[0] // block, settle_block, (blank, blank, held))
    return done[1][:k], jax.tree.map(lambda x: x[:k], done[2])


def _filled(count: int, x: jax.Array) -> jax.Array:
    # With steps that the last row has, and with nothing that is kept or counted.
    mode = "edge" if jnp.issubdtype(x.dtype, jnp.floating) else "constant"
    return jnp.pad(x, [(0, count)] + [(0, 0)] * (x.ndim - 1), mode=mode)


def _rows(x: jax.Array, at: Any, count: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, at, count, 0)


def _columns(x: jax.Array, at: Any, count: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, at, count, 1)


def _with_rows(x: jax.Array, rows: jax.Array, at: Any) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, rows, at, 0)
