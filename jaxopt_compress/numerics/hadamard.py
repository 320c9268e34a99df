"""Randomized Hadamard transforms: orthogonal, spread out, and cheap."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_DENSE = 32  # powers of two up to this are one matrix
_LARGEST = 256  # of the sizes that Paley's constructions are tried for


def rotated(
    x: jax.Array,
    signs: jax.Array,
    axes: Sequence[int],
    *,
    inverse: bool = False,
    in_order: bool = False,
) -> jax.Array:
    r"""Multiplies by :math:`R = \mathrm{diag}(s) H` along some axes, in ``O(n log n)``.

    :math:`R` is orthogonal, so that products of two arrays that are rotated along the axes that are
    summed over stay as they are.

    Args:
        x: An array of any shape and real floating dtype; sums are taken in float32 or wider.
        signs: 1 and -1, of the rank of ``x``, of size 1 along other axes than ``axes``.
        axes: Which; along several, :math:`H` is the Kronecker product.
        inverse: Multiplies by :math:`R^T` instead.
        in_order: Adds in one order, so that all programs give the same bits; slower.

    Returns:
        An array of the shape and dtype of ``x``.

    Example:
        >>> x, signs = jnp.array([[3.0, 0.0, 0.0, 0.0]]), jnp.array([[-1, 1, 1, 1]])
        >>> rotated(x, signs, [-1]).tolist()
        [[-1.5, -1.5, -1.5, -1.5]]
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = x.astype(wide)
    y = y if inverse else y * signs.astype(wide)
    for axis in axes:
        y = _transformed(y, axis % x.ndim, inverse, in_order)
    y = y * signs.astype(wide) if inverse else y
    return y.astype(x.dtype)


def _transformed(x: jax.Array, axis: int, inverse: bool, in_order: bool) -> jax.Array:
    """The orthonormal transform along one axis, one factor of its size after the other."""
    shape = x.shape
    factors = transform_sizes(shape[axis])
    rest = shape[axis] // int(np.prod(factors, initial=1))
    x = x.reshape(*shape[:axis], rest, *factors, *shape[axis + 1 :])
    for i, size in enumerate(factors, axis + 1):
        matrix = hadamard(size).T if inverse else hadamard(size)
        if in_order and _is_power(size):
            x = _butterflies(x, i)
            continue
        if in_order:
            x = _summed_in_order(x, jnp.asarray(matrix, x.dtype), i)
            continue
        matrix = jnp.asarray(matrix / np.sqrt(size), x.dtype)
        y = lax.dot_general(x, matrix, (([i], [0]), ([], [])), precision=lax.Precision.HIGHEST)
        x = jnp.moveaxis(y, -1, i)
    # One product at the end: none that a compiler could contract with a sum.
    x = x * np.asarray(1 / np.sqrt(np.prod(factors, initial=1)), x.dtype) if in_order else x
    return x.reshape(shape)


def _butterflies(x: jax.Array, axis: int) -> jax.Array:
    """``x @ hadamard(n)`` along an axis of a power of two; sums and differences of pairs."""
    shape, pairs = x.shape, (2,) * (x.shape[axis].bit_length() - 1)
    x = x.reshape(*shape[:axis], *pairs, *shape[axis + 1 :])
    for i in range(axis, axis + len(pairs)):
        one, other = (lax.index_in_dim(x, j, i, keepdims=False) for j in (0, 1))
        x = jnp.stack([one + other, one - other], i)
    return x.reshape(shape)


def _summed_in_order(x: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    """``x @ matrix`` along an axis; products with 1 and -1 are exact, and sums one by one."""
    row = lambda j: matrix[j].reshape(-1, *(1,) * (x.ndim - 1 - axis))
    add = lambda j, y: y + lax.dynamic_index_in_dim(x, j, axis) * row(j)
    return lax.fori_loop(0, len(matrix), add, jnp.zeros_like(x))


@functools.cache
def transform_sizes(n: int) -> tuple[int, ...]:
    """The sizes of the Hadamard matrices whose Kronecker product transforms ``n`` numbers.

    Where no construction gives a whole matrix, their product divides ``n``, and the transform is
    one of each block of neighbors; it is empty for odd sizes.

    Example:
        >>> transform_sizes(4096), transform_sizes(576), transform_sizes(52 * 19)
        ((32, 32, 4), (16, 36), (4,))
    """
    bases = [b for b in range(12, _LARGEST + 1, 4) if n % b == 0 and _is_power(n // b)]
    base = next((b for b in bases if not _is_power(b) and hadamard_exists(b)), 1)
    power = n // base & -(n // base)
    found = []
    while power > 1:
        size = min(power, _DENSE)
        found.append(size)
        power //= size
    return (*found, *([base] if base > 1 else []))


def _is_power(n: int) -> bool:
    return n & (n - 1) == 0


def hadamard_exists(n: int) -> bool:
    """Whether `hadamard` has a matrix of this size."""
    return _is_power(n) or _prime(n - 1, 3) or (n % 2 == 0 and _prime(n // 2 - 1, 1))


def _prime(q: int, rest: int) -> bool:
    """Whether ``q`` is a prime that leaves ``rest`` when it is divided by 4."""
    return q % 4 == rest and q > 2 and all(q % d for d in range(2, int(q**0.5) + 1))


@functools.cache
def hadamard(n: int) -> np.ndarray:
    """A matrix of 1 and -1 with orthogonal rows, int8: Sylvester's, or one of Paley's.

    Example:
        >>> h = hadamard(12).astype(int)
        >>> bool((h @ h.T == 12 * np.eye(12)).all())
        True

    References:
        Paley, 1933, On Orthogonal Matrices.
    """
    two = np.array([[1, 1], [1, -1]], np.int8)
    if n == 1:
        return np.ones((1, 1), np.int8)
    if _is_power(n):
        return np.kron(two, hadamard(n // 2))
    if _prime(n - 1, 3):
        return (np.eye(n, dtype=np.int8) + _conference(n - 1, -1)).astype(np.int8)
    if n % 2 or not _prime(n // 2 - 1, 1):
        raise ValueError(f"no Hadamard matrix of size {n} is known here")
    diagonal = np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(_conference(n // 2 - 1, 1), two) + np.kron(
        np.eye(n // 2, dtype=np.int8), diagonal
    )


def _conference(q: int, sign: int) -> np.ndarray:
    """Zeros on the diagonal, quadratic characters of differences elsewhere, and a border."""
    character = np.full(q, -1, np.int8)
    character[np.arange(q) ** 2 % q] = 1
    character[0] = 0
    inner = character[(np.arange(q)[:, None] - np.arange(q)) % q]
    out = np.ones((q + 1, q + 1), np.int8)
    out[0, 0], out[1:, 0], out[1:, 1:] = 0, sign, inner
    return out
