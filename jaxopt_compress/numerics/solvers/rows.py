"""Matrices settled row after row, each row's error passed on to the rows behind it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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

    def settle_part(i, own, held):
        # The last part may end before its rows do.
        some = jnp.minimum(blocks, count - i * blocks)
        return _in_turn(settle_block, own, held, block, some)

    def settle_block(i, own, held):
        del i
        if of_block is not None:
            held = of_block(own.w + _free(own), own.diagonal, held)
        return _in_turn(settle_step, own, held, step, block // step)

    def settle_step(i, own, held):
        del i
        if of_step is not None:
            held = of_step(own.w + _free(own), own.diagonal, held)

        def settle_row(j, carry):
            apart, made = carry
            row = own.w[j] + (own.sums[j] + _dot(own.factor[:, j], apart))
            value = settle(row, jax.tree.map(lambda x: x[j], held))
            return apart.at[j].set(own.w[j] - value), made.at[j].set(value)

        blank = jnp.zeros_like(own.w)
        return (*lax.fori_loop(0, step, settle_row, (blank, blank)), held)

    whole = Rows(w, jnp.zeros_like(w), factor, diagonal)
    # One compiled body for all parts, blocks, steps and rows.
    _, settled, held = _in_turn(settle_part, whole, held, part, len(w) // part, _sums_by_parts)
    return settled[:k], jax.tree.map(lambda x: x[:k], held)


class Rows(NamedTuple):
    """Consecutive rows, and what corrects them.

    Attributes:
        w: ``[k, n]``, as they were given.
        sums: ``[k, n]``: the corrections for the errors of all rows before these.
        factor: ``[k, k]``: how their own errors are passed on, with a diagonal of ones.
        diagonal: ``[k]``: what the factor was divided by.
    """

    w: jax.Array
    sums: jax.Array
    factor: jax.Array
    diagonal: jax.Array


def _in_turn(
    run: Callable[..., tuple[jax.Array, jax.Array, Held]],
    rows: Rows,
    held: Held,
    size: int,
    count: Any,
    sums: Callable[..., jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, Held]:
    """Settles rows ``size`` by ``size``, each time corrected for the errors before.

    Args:
        run: ``run(i, rows, held) -> errors, settled, held`` settles ``size`` of them.
        rows: All of them.
        held: What belongs to them.
        size: How many at a time.
        count: How often.
        sums: ``sums(factor [k, size], errors [k, n], i) -> [size, n]``, by default one product.

    Returns:
        The errors and the values of the rows, 0 where they were not settled, and ``held``.
    """

    def body(i, carry):
        wrong, settled, held = carry
        at = i * size
        columns = _columns(rows.factor, at, size)
        added = _dot(columns.T, wrong) if sums is None else sums(columns, wrong, i)
        w, before, diagonal = (_rows(x, at, size) for x in (rows.w, rows.sums, rows.diagonal))
        own = Rows(w, before + added, _rows(columns, at, size), diagonal)
        apart, made, mine = run(i, own, jax.tree.map(lambda x: _rows(x, at, size), held))
        held = jax.tree.map(lambda x, new: _with_rows(x, new, at), held, mine)
        return _with_rows(wrong, apart, at), _with_rows(settled, made, at), held

    blank = jnp.zeros_like(rows.w)
    return lax.fori_loop(0, count, body, (blank, blank, held))


def _sums_by_parts(columns: jax.Array, wrong: jax.Array, i: Any) -> jax.Array:
    """Products with the parts that are settled, and none with the others."""
    size = columns.shape[1]

    def add(part, sums):
        done = part * size
        return sums + _dot(_rows(columns, done, size).T, _rows(wrong, done, size))

    # As split among devices as the errors are, under `jax.shard_map`.
    return lax.fori_loop(0, i, add, jnp.zeros_like(wrong[:size]))


def _free(rows: Rows) -> jax.Array:
    """The corrections of rows that are all free yet, from the sums over those before them."""
    return lax.linalg.triangular_solve(
        rows.factor, rows.sums, left_side=True, transpose_a=True, unit_diagonal=True
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
