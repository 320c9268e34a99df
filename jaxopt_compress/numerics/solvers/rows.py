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

# Parts between which products with rows that are not settled yet are left out.
_PARTS = 4

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

    Row :math:`j` becomes :math:`q_j`, what ``settle`` makes of

    .. math:: w_j + \frac{1}{V_{jj}} \sum_{i < j} V_{ij} (w_i - q_i)

    which is the best that it can do about the errors of the rows before it in
    :math:`\mathrm{tr}(D^T H D)` if those behind it stay free, with :math:`H = V V^T`.
    Rows are corrected when their block, and in it their step, is due: two products instead of one
    update of all later rows per row.

    Args:
        w: Float32 ``[k, n]``.
        factor: ``[k, k]``, what `upper_factor` made.
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
    count = -(-k // block)
    blocks = -(-count // _PARTS)
    part = blocks * block
    w, held = (jax.tree.map(functools.partial(_filled, -k % part), x) for x in (w, held))
    diagonal = jnp.pad(jnp.diagonal(factor), (0, -k % part), constant_values=1)
    factor = jnp.pad(factor, [(0, -k % part)] * 2) / diagonal

    def settle_step(i, carry, first, sums, corner, scales):
        wrong, settled, own = carry
        at = i * step
        before = _rows(first, at, step)
        due = _rows(sums, at, step) + _dot(_columns(corner, at, step).T, wrong)
        mine = jax.tree.map(lambda x: _rows(x, at, step), own)
        small = _columns(_rows(corner, at, step), at, step)
        if of_step is not None:
            mine = of_step(before + _free(small, due), _rows(scales, at, step), mine)
            own = jax.tree.map(lambda x, new: _with_rows(x, new, at), own, mine)

        def settle_row(j, carry):
            apart, made = carry
            row = before[j] + (due[j] + _dot(small[:, j], apart))
            value = settle(row, jax.tree.map(lambda x: x[j], mine))
            return apart.at[j].set(before[j] - value), made.at[j].set(value)

        blank = jnp.zeros_like(due)
        apart, made = lax.fori_loop(0, step, settle_row, (blank, blank))
        return _with_rows(wrong, apart, at), _with_rows(settled, made, at), own

    def settle_block(b, carry, first, sums, corner, scales):
        wrong, settled, held = carry
        at = b * block
        columns, rows = _columns(corner, at, block), _rows(first, at, block)
        due = _rows(sums, at, block) + _dot(columns.T, wrong)
        own_corner, own_scales = _rows(columns, at, block), _rows(scales, at, block)
        own = jax.tree.map(lambda x: _rows(x, at, block), held)
        if of_block is not None:
            own = of_block(rows + _free(own_corner, due), own_scales, own)
        blank = jnp.zeros_like(rows)
        given = {"first": rows, "sums": due, "corner": own_corner, "scales": own_scales}
        run = functools.partial(settle_step, **given)
        apart, made, own = lax.fori_loop(0, block // step, run, (blank, blank, own))
        held = jax.tree.map(lambda x, new: _with_rows(x, new, at), held, own)
        return _with_rows(wrong, apart, at), _with_rows(settled, made, at), held

    def settle_part(p, carry):
        wrong, settled, held = carry
        at = p * part
        first, columns = _rows(w, at, part), _columns(factor, at, part)

        def add(i, sums):
            done = i * part
            return sums + _dot(_rows(columns, done, part).T, _rows(wrong, done, part))

        blank = jnp.zeros_like(first)
        given = {"first": first, "sums": lax.fori_loop(0, p, add, blank)}
        given |= {"corner": _rows(columns, at, part), "scales": _rows(diagonal, at, part)}
        own = jax.tree.map(lambda x: _rows(x, at, part), held)
        run = functools.partial(settle_block, **given)
        # The last part may end before its rows do.
        some = jnp.minimum(blocks, count - p * blocks)
        apart, made, own = lax.fori_loop(0, some, run, (blank, blank, own))
        held = jax.tree.map(lambda x, new: _with_rows(x, new, at), held, own)
        return _with_rows(wrong, apart, at), _with_rows(settled, made, at), held

    # One compiled body for all parts, blocks, steps and rows.
    start = (jnp.zeros_like(w), jnp.zeros_like(w), held)
    _, settled, held = lax.fori_loop(0, len(w) // part, settle_part, start)
    return settled[:k], jax.tree.map(lambda x: x[:k], held)


def _free(corner: jax.Array, sums: jax.Array) -> jax.Array:
    """The corrections of rows that are all free yet, from the sums over those before them."""
    return lax.linalg.triangular_solve(
        corner, sums, left_side=True, transpose_a=True, unit_diagonal=True
    )


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
