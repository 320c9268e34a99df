"""Matrices as sums of Kronecker products: tensor trains of two cores."""

from jaxopt_compress.compression import (
    Compression,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.low_rank.low_rank import ELSEWHERE
from jaxopt_compress.low_rank.tensor_train import Asked, Digits, made
from jaxopt_compress.tree import Where


@answers(ELSEWHERE)
def kronecker(
    rank: int | None = None,
    error: float | None = None,
    where: Where = None,
    *,
    ratio: float | None = None,
    shape: Digits | None = None,
    stack: int = 0,
) -> Compression:
    r"""Replaces matrices by sums of Kronecker products.

    .. math:: W \approx \sum_{r} A_r \otimes B_r

    These are tensor trains of two cores, and the nearest ones of the rank: what Van Loan's
    rearrangement of the matrix gives. A product with one runs as two smaller products.

    Args:
        rank: How many terms. Or
        error: as in `tensor_train`; or
        where: Which parameters: matrices, and stacks of some.
        ratio: as in `tensor_train`.
        shape: ``((rows of A, rows of B), (columns of A, columns of B))``; by default as equal as
            can be.
        stack: As in `low_rank`.

    Returns:
        A `Compression` that stores `TensorTrainArray` with two cores: ``A``, ``[n, m r]``, and
        ``B``, ``[r n, m]``.

    Raises:
        ValueError: As `tensor_train`.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> a, b = jnp.arange(6.0).reshape(2, 3), jnp.ones((4, 5)).at[0, 0].set(7)
        >>> params = {"w": jnp.kron(a, b)}
        >>> small = jc.compress(params, jc.kronecker(rank=1, shape=((2, 4), (3, 5))))
        >>> bool(jnp.allclose(jc.materialize(small)["w"], params["w"], atol=1e-4))
        True
        >>> jc.nbytes(params), jc.nbytes(small)
        (480, 104)

    References:
        Van Loan and Pitsianis, 1993, Approximation with Kronecker Products. Hameed et al., 2022,
        Convolutional Neural Network Compression through Generalized Kronecker Product
        Decomposition.
    """
    return made("kronecker", Asked(rank, error, ratio, shape, 2), where, stack)
