"""Sums of factors of low rank."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.parallel.reduction import AxisName, Reduction


def power_sgd(rank: int = 4) -> Reduction:
    r"""PowerSGD: averages two thin factors in the place of a matrix.

    One step of a power iteration, which goes on from the factor of the step before:

    .. math::

        P = \mathrm{orth}\Big(\frac 1 D \sum_i M_i Q\Big), \quad
        Q' = \frac 1 D \sum_i M_i^T P, \quad \bar M = P Q'^T

    A matrix of ``(k, n)`` costs ``rank (k + n)`` floats in two all-reduces. It is left to a plain
    sum if that is no fewer than ``k n``. Each layer of a stack has factors of its own.

    Args:
        rank: Columns of the factors.

    Returns:
        A method for `reduced_gradients`.

    Raises:
        ValueError: ``rank`` is no positive number.

    Example:
        >>> import jaxopt_compress as jc
        >>> tx = jc.reduced_gradients(jc.power_sgd(rank=4), axis_name="data")

    References:
        Vogels et al., 2019, PowerSGD: Practical Low-Rank Gradient Compression for Distributed
        Optimization.
    """
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank={rank!r}; it is a positive number of columns")

    def takes(shape: tuple[int, ...]) -> bool:
        k, n = shape[-2:]
        return rank * (k + n) < k * n

    def init(shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        return jax.random.normal(key, (shape[0], shape[-1], rank))

    def mean(
        m: jax.Array, q: jax.Array, axis_name: AxisName
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        # Of matrices of zeros an orthogonal factor is the first columns of the identity, from which
        # the next step finds its way.
        p, _ = jnp.linalg.qr(lax.pmean(_dot(m, q), axis_name))
        own = _dot(m.swapaxes(-1, -2), p)
        q = lax.pmean(own, axis_name)
        return _dot(p, q.swapaxes(-1, -2)), _dot(p, own.swapaxes(-1, -2)), q

    return Reduction(f"power_sgd(rank={rank})", takes, init, mean)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Products of stacked matrices, in float32 wherever."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
