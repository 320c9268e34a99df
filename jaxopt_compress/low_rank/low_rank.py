"""Parameters as products of two thin factors."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import LowRankArray, MaskedArray, PermutedArray, is_compressed
from jaxopt_compress.arrays.fields import is_traced
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
from jaxopt_compress.compression.leaf_states import GRID, RANK, ZEROS
from jaxopt_compress.numerics.svd import balanced_factors, rank_for_energy
from jaxopt_compress.tree import Where


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=[], meta_fields=["dtype", "out_ndim", "axes"]
)
@dataclasses.dataclass(frozen=True)
class FactoredState(LeafState):
    """How the learned factors of one parameter make up the dense array.

    Attributes:
        dtype: Its dtype.
        out_ndim: How many trailing axes the second factor has.
        axes: The order of axes in which the factors have them, as of `PermutedArray`; None for the
            parameter's own.
    """

    dtype: np.dtype
    out_ndim: int
    axes: tuple[int, ...] | None = None
    kind = "low_rank"
    establishes = frozenset({RANK})
    replaces = True

    def why_lost(self, name: str) -> str | None:
        """Why factors keep nothing of a dense matrix."""
        if name == RANK:
            return "the second rank replaces the first; keep one of the two"
        return {
            ZEROS: "the factors of a pruned matrix are dense, so that its zeros would be lost; "
            "factorize first, or keep one of the two",
            GRID: "the factors of a quantized matrix are not quantized; use chain(low_rank(...), "
            "quantize(...))",
        }.get(name)

    def apply(self, w: Any, learned: Any) -> LowRankArray | PermutedArray:
        """The product of the factors, still apart; ``w`` itself is not used."""
        del w
        product = LowRankArray(learned["u"], learned["v"], self.dtype, self.out_ndim)
        return product if self.axes is None else PermutedArray(product, self.axes)

    def compress(self, w: Any, learned: Any, path: str) -> LowRankArray | PermutedArray:
        """The factors."""
        del path
        return self.apply(w, learned)


_ELSEWHERE = {
    **dict.fromkeys(("r", "k", "n_components", "lora_rank"), "write rank="),
    **dict.fromkeys(
        ("ratio", "compression_ratio", "explained_variance"),
        "write energy=, the share of the sum of squares to keep",
    ),
    **dict.fromkeys(("layers", "target_modules", "targets"), "write where='**/kernel'"),
}


@answers(_ELSEWHERE)
def low_rank(
    rank: int | None = None,
    energy: float | None = None,
    where: Where = None,
    *,
    stack: int = 0,
) -> Compression:
    """Replaces parameters by the product of two factors, from a truncated SVD.

    A parameter is read as a matrix from the axes that the function contracts to the others (or the
    other way round), in whatever order they lie; leading stack axes are matrices of their own with
    a common rank. In training
    the factors are what learns: gradients go to them, and the dense parameter stays as it was.

    Args:
        rank: The inner dimension; or
        energy: the share of the sum of squares to keep, in ``(0, 1]``; the rank is then chosen per
            parameter in ``init``, which cannot run under jit.
        where: Which parameters; by default the floating ones of rank 2 and more, and where uses are
            given only those with a use.
        stack: How many leading axes of each are a stack of parameters of their own, whatever uses
            say of them, such as the members of an ensemble under `jax.vmap`.

    Returns:
        A `Compression` that stores `LowRankArray`, in a `PermutedArray` where contracted axes lie
        between others.

    Raises:
        ValueError: Not exactly one of ``rank`` and ``energy`` given, or out of range; in ``init``:
            a rank above the limit, nothing that is summed over, or stack axes behind others.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> small = jc.compress(
        ...     {"w": jnp.outer(jnp.arange(6.0), jnp.arange(4.0))}, jc.low_rank(rank=1)
        ... )
        >>> small["w"].u.shape, small["w"].v.shape, small["w"].shape
        ((6, 1), (1, 4), (6, 4))

    References:
        Denton et al., 2014, Exploiting Linear Structure Within Convolutional Networks for Efficient
        Evaluation.
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"give either rank or energy, not rank={rank} and energy={energy}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank}; a rank is at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy}; it is the share of the squares kept, in (0, 1]")

    def check(parameter: Parameter) -> None:
        if is_compressed(parameter.value) and not isinstance(parameter.value, MaskedArray):
            raise TypeError(
                f"{parameter.describe()} is a {type(parameter.value).__name__} and cannot be "
                "factorized; materialize it first"
            )
        sides = _sides(parameter)
        shape = parameter.value.shape
        rows, columns = (math.prod(shape[d] for d in axes) for axes in (sides.left, sides.right))
        if not math.prod(shape):
            raise ValueError(f"{parameter.describe()} is empty and has no factors; exclude it")
        limit = min(rows, columns)
        if rank is not None and rank > limit:
            raise ValueError(
                f"rank={rank} is above the limit {limit} of {parameter.describe()}, read as a "
                f"matrix of {rows} by {columns}; use a rank of at most {limit}"
            )
        if energy is not None and is_traced(parameter.dense()):
            raise NeedsValues(
                f"energy={energy} needs the values of {parameter.describe()} to choose a rank: run "
                "init outside of jit, or give rank="
            )

    def init(parameter: Parameter) -> Decision:
        w, sides = parameter.dense(), _sides(parameter)
        stack = w.ndim - len(sides.left) - len(sides.right)
        left, right = ([w.shape[d] for d in axes] for axes in (sides.left, sides.right))
        if sides.permuted:
            w = jnp.transpose(w, (*range(-w.ndim, stack - w.ndim), *sides.left, *sides.right))
        matrices = w.reshape(*w.shape[:stack], math.prod(left), math.prod(right))
        r = rank if energy is None else int(jnp.max(rank_for_energy(matrices, energy)))
        u, v = balanced_factors(matrices, r)  # pyright: ignore[reportArgumentType]
        u = u.reshape(*w.shape[:stack], *left, *(1,) * (len(right) - 1), r)
        v = v.reshape(*w.shape[:stack], *(1,) * (len(left) - 1), r, *right)
        axes = (*sides.left, *sides.right) if sides.permuted else None
        return Decision(FactoredState(np.dtype(w.dtype), len(right), axes), {"u": u, "v": v})

    asked = spelled("low_rank", rank=rank, energy=energy, where=where, stack=stack or None)
    return compression_of(LeafMethod(check, init), where, stack=stack, asked=asked)


class _Sides(NamedTuple):
    """The axes of a parameter that make up the two sides of a matrix, as negative numbers.

    Attributes:
        left: Axes of the first factor.
        right: Axes of the second one.
        permuted: Whether they do not lie in this order behind the stack.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    permuted: bool


def _sides(parameter: Parameter) -> _Sides:
    """How a parameter is read as a matrix.

    Raises:
        ValueError: Nothing is contracted, or nothing else is left; or stack axes do not lead.
    """
    ndim, layout = len(parameter.value.shape), parameter.layout
    left, right = tuple(sorted(layout.contracting)), tuple(sorted(layout.output))
    stack = tuple(sorted(layout.stack))
    leads = stack == tuple(range(-ndim, len(stack) - ndim))
    if not (left and right and leads and sorted((*stack, *left, *right)) == list(range(-ndim, 0))):
        raise ValueError(
            f"{parameter.describe()} cannot be read as a matrix: its contracted axes are "
            f"{layout.contracting}, its output axes {layout.output} and its stack axes "
            f"{layout.stack}, which have to lead; exclude it"
        )
    if left[0] > right[0] and left[0] > right[-1]:
        left, right = right, left
    return _Sides(left, right, (*stack, *left, *right) != tuple(range(-ndim, 0)))
