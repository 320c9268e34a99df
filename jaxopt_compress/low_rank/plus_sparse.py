"""Parameters as thin factors and a few entries that these miss."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import MaskedArray, SumArray
from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.arrays.sparse import sparse_rows
from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    LeafState,
    NeedsValues,
    Parameter,
    compression_of,
    spelled,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.low_rank.low_rank import ELSEWHERE
from jaxopt_compress.low_rank.reading import FactoredState, reading_of
from jaxopt_compress.numerics.plus_sparse import go_dec, robust_pca
from jaxopt_compress.numerics.svd import balanced_factors
from jaxopt_compress.tree import Where
from jaxopt_compress.typing import Leaf, PyTree


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["mask"], meta_fields=["factored", "stack"]
)
@dataclasses.dataclass(frozen=True)
class PlusSparseState(LeafState):
    """How learned factors and entries make up the dense array.

    Attributes:
        mask: Booleans of its shape, true where there is an entry beside the factors.
        factored: How the factors make up their part.
        stack: How many leading axes hold parameters of their own.
    """

    mask: Any
    factored: FactoredState
    stack: int
    kind = "low_rank_plus_sparse"
    replaces = True

    def why_lost(self, name: str) -> str | None:
        """As of factors alone."""
        return self.factored.why_lost(name)

    def apply(self, w: Leaf, learned: PyTree) -> SumArray:
        """The sum of both parts, still apart; ``w`` itself is not used."""
        factors = self.factored.apply(w, learned)
        return SumArray((factors, MaskedArray(learned["entries"], self.mask)))

    def compress(self, w: Leaf, learned: PyTree, path: str) -> SumArray:
        """The factors, and the entries under the mask."""
        entries = learned["entries"]
        stored = sparse_rows(entries, self.mask, entries.ndim - self.stack)
        return SumArray((self.factored.compress(w, learned, path), stored))


@answers(ELSEWHERE | {"lambd": "leave out rank= and sparsity=: both then follow from the values"})
def low_rank_plus_sparse(
    rank: int | None = None,
    sparsity: float | None = None,
    where: Where = None,
    *,
    rounds: int | None = None,
    key: jax.Array | None = None,
    stack: int = 0,
) -> Compression:
    r"""Replaces parameters by thin factors and the few entries that these miss.

    .. math:: W \approx U V + S, \qquad \mathrm{rank}(U V) \le r, \quad \lVert S \rVert_0 \le k

    Under `lift` a product is ``(x @ u) @ v + x @ S``. Outliers would cost a rank each, and cost an
    entry here. In training factors and entries learn, and the dense parameter stays as it was.

    Args:
        rank: The inner dimension of the factors.
        sparsity: The share of entries that are 0 in :math:`S`, above 0 and below 1, such as 0.99.
            Without both, robust PCA finds a rank and a sparsity per parameter from its values, in
            ``init`` outside of jit; they are small only where such a structure is there.
        where: As in `low_rank`.
        rounds: How often factors and entries are found anew; 10 by default, for robust PCA 60.
        key: As in `low_rank`.
        stack: As in `low_rank`.

    Returns:
        A `Compression` that stores a `SumArray` of a `LowRankArray` and a `SparseArray`. In chains
        later elements meet the factors and the entries.

    Raises:
        ValueError: One of ``rank`` and ``sparsity`` alone, or one out of range; or as `low_rank`.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> w = jnp.outer(jnp.arange(1.0, 9.0), jnp.ones(8)).at[3, 5].add(20.0)
        >>> small = jc.compress({"w": w}, jc.low_rank_plus_sparse(rank=1, sparsity=0.98))["w"]
        >>> small
        SumArray(low rank 1 plus sparse gaps, float32[8,8], 8.62 bits per weight, 69 bytes)
        >>> bool(jnp.allclose(small.materialize(), w, atol=1e-4))
        True

    References:
        Zhou and Tao, 2011, GoDec. Candès et al., 2011, Robust Principal Component Analysis? Yu et
        al., 2017, On Compressing Deep Models by Low Rank and Sparse Decomposition.
    """
    if (rank is None) != (sparsity is None):
        raise ValueError(f"rank={rank} and sparsity={sparsity}: give both, or neither")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank}; a rank is at least 1")
    if sparsity is not None and not 0 < sparsity < 1:
        raise ValueError(f"sparsity={sparsity}; it is the share of zeros, above 0 and below 1")
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds={rounds}; it is at least 1")

    def check(parameter: Parameter) -> None:
        reading = reading_of(parameter)
        limit = min(reading.rows_and_columns)
        if rank is not None and rank > limit:
            raise ValueError(
                f"rank={rank} is above the limit {limit} of {parameter.describe()}; use a rank of "
                f"at most {limit}"
            )
        if rank is None and is_traced(parameter.dense()):
            raise NeedsValues(
                f"robust PCA needs the values of {parameter.describe()} to choose a rank: run init "
                "outside of jit, or give rank= and sparsity="
            )

    def init(parameter: Parameter) -> Decision:
        reading, dense = reading_of(parameter), parameter.dense()
        w = reading.matrices(dense)
        if rank is None or sparsity is None:
            u, v, mask = _pursued(w, rounds or 60)
        else:
            keep = round((1 - sparsity) * math.prod(w.shape[-2:]))
            u, v, mask = go_dec(w, rank, keep, rounds or 10, key)
        factored = reading.decision(u, v, dense.dtype)
        mask = reading.arrays(mask)
        product = factored.state.apply(None, factored.learned).materialize()
        left = dense.astype(jnp.float32) - product.astype(jnp.float32)
        top = float(jnp.finfo(dense.dtype).max)
        entries = jnp.where(mask, jnp.clip(left, -top, top), 0)
        learned = {**factored.learned, "entries": entries.astype(dense.dtype)}
        return Decision(PlusSparseState(mask, factored.state, len(reading.stack)), learned)

    asked = spelled("low_rank_plus_sparse", rank=rank, sparsity=sparsity, where=where)
    return compression_of(LeafMethod(check, init), where, stack=stack, asked=asked)


def _pursued(w: jax.Array, rounds: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Factors and a mask by robust PCA; a stack has the largest rank of its entries."""
    matrices = w.reshape(-1, *w.shape[-2:])
    pairs = [robust_pca(x, rounds) for x in matrices]
    low, sparse = (jnp.stack(parts).reshape(w.shape) for parts in zip(*pairs, strict=True))
    # Singular values below the threshold are exactly 0 up to rounding, which is relative to the
    # largest; a tolerance that is given to `matrix_rank` counts as an absolute one.
    rank = max(1, int(jnp.max(jnp.linalg.matrix_rank(low))))
    u, v = balanced_factors(low, rank)
    return u.astype(w.dtype), v.astype(w.dtype), sparse != 0
