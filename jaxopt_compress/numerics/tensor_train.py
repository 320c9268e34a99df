"""Matrices as tensor trains: digits of rows and columns, one core for each pair of them."""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxopt_compress.numerics.svd import error_curve, leading_directions, rank_for_error, unit_range


@functools.lru_cache
def digits_of(size: int, count: int) -> tuple[int, ...]:
    """Sizes of ``count`` digits, as equal as can be, whose product is ``size`` or little more.

    A product above ``size`` is worth it where it is nearly the same, and the factors of ``size``
    are far apart.

    Example:
        >>> digits_of(384, 3), digits_of(30522, 3), digits_of(7, 2)
        ((8, 6, 8), (34, 29, 31), (7, 1))
    """
    if count == 1 or size < 2:
        return (size, *(1,) * (count - 1))
    mean = size ** (1 / count)
    near = range(max(1, math.ceil(mean / 2)), math.floor(2 * mean) + 1)
    best, least = (size, *(1,) * (count - 1)), float(size)
    # Their order changes nothing, and would make each choice (count - 1)! ones.
    for rest in itertools.combinations_with_replacement(near, count - 1):
        own = (-(-size // math.prod(rest)), *rest)
        # A tenth more digits weighs as much as digits that are ten times as far apart.
        worth = max(own) / min(own) + 100 * (math.prod(own) / size - 1)
        if worth < least:
            best, least = own, worth
    return best


def largest_ranks(rows: Sequence[int], columns: Sequence[int]) -> list[int]:
    """The ranks between cores with which every matrix is exact."""
    sizes = [n * m for n, m in zip(rows, columns, strict=True)]
    return [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes))]


def train_size(rows: Sequence[int], columns: Sequence[int], ranks: Sequence[int]) -> int:
    """The entries of all cores."""
    ends = (1, *ranks, 1)
    return sum(r * n * m * s for r, n, m, s in zip(ends, rows, columns, ends[1:], strict=False))


def tensor_train_of(
    w: jax.Array,
    rows: Sequence[int],
    columns: Sequence[int],
    ranks: Sequence[int] | None = None,
    error: float | None = None,
) -> list[jax.Array]:
    r"""The cores of a matrix, by singular value decompositions from the last digit to the first.

    .. math:: W_{(i_1 \ldots i_d), (j_1 \ldots j_d)} \approx G_1[i_1, j_1] \cdots G_d[i_d, j_d]

    The error is at most :math:`\sqrt{d - 1}` times the least of any train with these ranks. With
    two cores it is the least: the sum of Kronecker products that Van Loan's rearrangement gives.

    Args:
        w: Floats, ``[*stack, n, m]``; rows and columns of zeros are added behind.
        rows: The sizes of the digits of a row, whose product is at least ``n``.
        columns: Those of a column.
        ranks: The ranks between cores; larger ones than `largest_ranks` are cut to these. Or
        error: the largest error relative to the norm of ``w``, of any entry of a stack; ranks then
            depend on values.

    Returns:
        ``[*stack, r, n, m, s]`` for each digit, in the dtype of ``w``; the magnitude of ``w`` is
        shared by all of them.

    References:
        Oseledets, 2011, Tensor-Train Decomposition. Van Loan and Pitsianis, 1993, Approximation
        with Kronecker Products.
    """
    count = len(rows)
    left, exponent = _interleaved(w, tuple(rows), tuple(columns))
    stack = left.shape[: left.ndim - 1]
    total = jnp.linalg.norm(left, axis=-1)
    limits, cores, right = largest_ranks(rows, columns), [], 1
    for k in range(count - 1, 0, -1):
        left = left.reshape(*stack, -1, rows[k] * columns[k] * right)
        if ranks is not None:
            rank = min(ranks[k - 1], limits[k - 1], *left.shape[-2:])
        else:
            assert error is not None
            rank = _rank_within(left, total, error / math.sqrt(count - 1))
        directions, left = _split(left, rank)
        cores.append(directions.reshape(*stack, rank, rows[k], columns[k], right))
        right = rank
    cores.append(left.reshape(*stack, 1, rows[0], columns[0], right))
    return _shared(cores[::-1], exponent, w.dtype)


@functools.partial(jax.jit, static_argnames=("rows", "columns"))
def _interleaved(
    w: jax.Array, rows: tuple[int, ...], columns: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """``[*stack, (i1 j1 i2 j2 ..)]`` with entries of at most 1, and the exponents taken out."""
    scaled, exponent = unit_range(w)
    stack, count = w.shape[:-2], len(rows)
    more = [(0, math.prod(s) - n) for s, n in zip((rows, columns), w.shape[-2:], strict=True)]
    scaled = jnp.pad(scaled, [(0, 0)] * len(stack) + more)
    scaled = scaled.reshape(*stack, *rows, *columns)
    lead = len(stack)
    order = [lead + d + k * count for d in range(count) for k in (0, 1)]
    return jnp.transpose(scaled, (*range(lead), *order)).reshape(*stack, -1), exponent


@functools.partial(jax.jit, static_argnames="rank")
def _split(left: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The leading right singular vectors ``[*stack, rank, n]``, and what the matrix is in them."""
    q = leading_directions(left, rank)
    return jnp.swapaxes(q, -2, -1), jnp.matmul(left, q, precision=jax.lax.Precision.HIGHEST)


def _rank_within(left: jax.Array, total: jax.Array, error: float) -> int:
    """The smallest rank, of all entries of a stack, whose error is that share of ``total``."""
    norm = jnp.linalg.norm(left, axis=(-2, -1))
    curve = error_curve(left) * (norm / jnp.where(total > 0, total, 1))[..., None]
    return int(jnp.max(rank_for_error(curve, error)))


@functools.partial(jax.jit, static_argnames="dtype")
def _shared(cores: list[jax.Array], exponent: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    """Cores with a part of the exponents each, and of the norm of the first, by powers of two."""
    count = len(cores)
    wide = lambda x: x.reshape(*exponent.shape[:-1], 1, 1, 1, 1)
    per_row = lambda x: jnp.sqrt(jnp.mean(jnp.square(x), (-4, -3, -2, -1)))[..., None]
    # What the magnitude of a core's entries is above the mean of all, as an exponent.
    sizes = [jnp.frexp(per_row(core))[1] for core in cores]
    total = exponent + sum(sizes)
    parts = [total // count + (total % count if k == 0 else 0) for k in range(count)]
    pairs = zip(cores, parts, sizes, strict=True)
    return [jnp.ldexp(core, wide(p - s)).astype(dtype) for core, p, s in pairs]


def train_product(cores: Sequence[jax.Array], top: float) -> jax.Array:
    """The matrix of a tensor train, ``[*stack, n, m]``, the same bits in every program.

    Args:
        cores: ``[*stack, r, n, m, s]`` for each digit.
        top: The largest magnitude of a result.
    """
    stack = cores[0].shape[:-4]
    total = jax.lax.optimization_barrier(cores[0].astype(jnp.float32))
    total = total.reshape(*stack, -1, total.shape[-1])
    for core in cores[1:]:
        # Sealed off, so that each product is compiled alone.
        total, own = jax.lax.optimization_barrier((total, core.astype(jnp.float32)))
        own = own.reshape(*stack, own.shape[-4], -1)
        total = jnp.matmul(total, own, precision=jax.lax.Precision.HIGHEST)
        # The bounds keep a product of rank 1 from being contracted with a sum that follows.
        total = jnp.clip(total, -top, top).reshape(*stack, -1, core.shape[-1])
    lead, count = len(stack), len(cores)
    digits = [n for core in cores for n in core.shape[-3:-1]]
    total = total.reshape(*stack, *digits)
    order = [lead + 2 * d + k for k in (0, 1) for d in range(count)]
    rows = math.prod(digits[::2])
    return jnp.transpose(total, (*range(lead), *order)).reshape(*stack, rows, -1)
