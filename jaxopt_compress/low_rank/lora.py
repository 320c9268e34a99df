"""Adapters: a frozen parameter and thin factors that are trained beside it."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import SumArray
from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    LeafState,
    Parameter,
    compression_of,
    spelled,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.compression.leaf_states import GRID, N_M, RANK, ZEROS
from jaxopt_compress.low_rank.low_rank import ELSEWHERE
from jaxopt_compress.low_rank.reading import FactoredState, reading_of
from jaxopt_compress.tree import Where
from jaxopt_compress.typing import Leaf, PyTree


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["factored"])
@dataclasses.dataclass(frozen=True)
class AdaptedState(LeafState):
    """How learned factors make up what is added to one parameter.

    Attributes:
        factored: How the factors make up their part.
    """

    factored: FactoredState
    kind = "lora"
    # The parameter itself keeps all of these, since it stays as it is stored.
    keeps = frozenset({ZEROS, N_M, RANK, GRID})
    replaces = True

    def apply(self, w: Leaf, learned: PyTree) -> SumArray:
        """The sum of the parameter, which gets no gradient, and the product of the factors."""
        frozen = jax.tree.map(jax.lax.stop_gradient, w)
        return SumArray((frozen, self.factored.apply(None, learned)))

    def compress(self, w: Leaf, learned: PyTree, path: str) -> SumArray:
        """The parameter as it is stored, and the factors."""
        return SumArray((w, self.factored.compress(None, learned, path)))


@answers(
    ELSEWHERE
    | {"alpha": "scale the updates of the learned parts, by the learning rate of learned="}
    | {"dropout": "there is none; put it into the function"}
)
def lora(
    rank: int,
    where: Where = None,
    *,
    key: jax.Array | None = None,
    stack: int = 0,
) -> Compression:
    r"""Freezes parameters, and trains thin factors that are added to them.

    .. math:: W + U V, \qquad U_{ij} \sim N(0, 1/k), \quad V = 0

    so that training starts at :math:`W`. Only factors get gradients and optimizer states:
    :math:`r (k + n)` numbers in the place of :math:`k n`. :math:`W` may be compressed: in
    ``chain(quantize("int4"), lora(8))`` the factors learn what the codes miss.
    `jaxopt_compress.materialize` merges both.

    Args:
        rank: The inner dimension of the factors, at least 1.
        where: As in `low_rank`.
        key: The random key of the first factor; by default a fixed one.
        stack: As in `low_rank`.

    Returns:
        A `Compression` that stores a `SumArray` of the parameter and a `LowRankArray`; it trains by
        `compressed_training`, as any other.

    Raises:
        ValueError: ``rank`` is below 1, or above the limit of a parameter; or as `low_rank`.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jnp.ones((64, 8))}
        >>> small = jc.compress(params, jc.chain(jc.quantize("int8"), jc.lora(2)))["w"]
        >>> small
        SumArray(int8 plus low rank 2, float32[64,8], 17.5 bits per weight, 1,120 bytes)

    References:
        Hu et al., 2022, LoRA: Low-Rank Adaptation of Large Language Models. Dettmers et al., 2023,
        QLoRA: Efficient Finetuning of Quantized LLMs.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}; a rank is at least 1")
    key = jax.random.key(0) if key is None else key

    def check(parameter: Parameter) -> None:
        limit = min(reading_of(parameter, stored=True).rows_and_columns)
        if rank > limit:
            raise ValueError(
                f"rank={rank} is above the limit {limit} of {parameter.describe()}; use a rank of "
                f"at most {limit}"
            )

    def init(parameter: Parameter) -> Decision:
        reading, dtype = reading_of(parameter, stored=True), parameter.value.dtype
        k, n = reading.rows_and_columns
        own = jax.random.fold_in(key, zlib.crc32(parameter.path.encode()))
        u = jax.random.normal(own, (*reading.stack, k, rank), jnp.float32) / k**0.5
        v = jnp.zeros((*reading.stack, rank, n), dtype)
        factored = reading.decision(u.astype(dtype), v, dtype)
        return Decision(AdaptedState(factored.state), factored.learned)

    asked = spelled("lora", rank, where=where, stack=stack or None)
    return compression_of(LeafMethod(check, init), where, stack=stack, asked=asked)
