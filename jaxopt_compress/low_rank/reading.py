"""How a parameter is read as a matrix, and factors as a parameter."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import LowRankArray, MaskedArray, PermutedArray, is_compressed
from jaxopt_compress.compression import Decision, LeafState, Parameter
from jaxopt_compress.compression.leaf_states import GRID, RANK, ZEROS
from jaxopt_compress.typing import Leaf, PyTree


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

    def apply(self, w: Leaf, learned: PyTree) -> LowRankArray | PermutedArray:
        """The product of the factors, still apart; ``w`` itself is not used."""
        del w
        product = LowRankArray(learned["u"], learned["v"], self.dtype, self.out_ndim)
        return product if self.axes is None else PermutedArray(product, self.axes)

    def compress(self, w: Leaf, learned: PyTree, path: str) -> LowRankArray | PermutedArray:
        """The factors."""
        del path
        return self.apply(w, learned)


class Reading(NamedTuple):
    """The axes of a parameter that make up the two sides of a matrix, as negative numbers.

    Attributes:
        shape: The shape of the parameter.
        left: Axes of the first factor.
        right: Axes of the second one.
        permuted: Whether their order behind the stack is another one.
        turned: Whether the right ones are those that the function sums over.
    """

    shape: tuple[int, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    permuted: bool
    turned: bool

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the leading axes whose entries are matrices of their own."""
        return self.shape[: len(self.shape) - len(self.left) - len(self.right)]

    @property
    def rows_and_columns(self) -> tuple[int, int]:
        """``(k, n)``: how many entries are summed over, and how many are not."""
        size = lambda axes: math.prod(self.shape[d] for d in axes)
        k, n = (self.right, self.left) if self.turned else (self.left, self.right)
        return size(k), size(n)

    def matrices(self, w: jax.Array) -> jax.Array:
        """An array of the parameter's shape as ``[*stack, k, n]``."""
        k, n = (self.right, self.left) if self.turned else (self.left, self.right)
        order = (*range(len(self.stack)), *(w.ndim + d for d in (*k, *n)))
        if order != tuple(range(w.ndim)):
            w = jnp.transpose(w, order)
        return w.reshape(*self.stack, *self.rows_and_columns)

    def arrays(self, m: jax.Array) -> jax.Array:
        """Inverts `matrices`."""
        k, n = (self.right, self.left) if self.turned else (self.left, self.right)
        ndim = len(self.shape)
        order = (*range(len(self.stack)), *(ndim + d for d in (*k, *n)))
        m = m.reshape([self.shape[d] for d in order])
        return jnp.transpose(m, sorted(range(ndim), key=order.__getitem__))

    def decision(self, u: jax.Array, v: jax.Array, dtype: Any) -> Decision:
        """The decision for factors ``[*stack, k, r]`` and ``[*stack, r, n]``."""
        if self.turned:
            u, v = jnp.swapaxes(v, -2, -1), jnp.swapaxes(u, -2, -1)
        left, right = ([self.shape[d] for d in axes] for axes in (self.left, self.right))
        u = u.reshape(*self.stack, *left, *(1,) * (len(right) - 1), u.shape[-1])
        v = v.reshape(*self.stack, *(1,) * (len(left) - 1), v.shape[-2], *right)
        axes = (*self.left, *self.right) if self.permuted else None
        return Decision(FactoredState(np.dtype(dtype), len(right), axes), {"u": u, "v": v})


def reading_of(parameter: Parameter, stored: bool = False) -> Reading:
    """How a parameter is read as a matrix.

    Args:
        parameter: The parameter.
        stored: Whether it may be compressed, where no entry of it is read.

    Raises:
        TypeError: It is compressed already.
        ValueError: Nothing is contracted, or nothing else is left; or stack axes do not lead; or it
            is empty.
    """
    value, layout = parameter.value, parameter.layout
    if is_compressed(value) and not stored and not isinstance(value, MaskedArray):
        raise TypeError(
            f"{parameter.describe()} is a {type(value).__name__} and cannot be factorized; "
            "materialize it first"
        )
    ndim = len(value.shape)
    left, right = tuple(sorted(layout.contracting)), tuple(sorted(layout.output))
    stack = tuple(sorted(layout.stack))
    leads = stack == tuple(range(-ndim, len(stack) - ndim))
    if not (left and right and leads and sorted((*stack, *left, *right)) == list(range(-ndim, 0))):
        raise ValueError(
            f"{parameter.describe()} cannot be read as a matrix: its contracted axes are "
            f"{layout.contracting}, its output axes {layout.output} and its stack axes "
            f"{layout.stack}, which have to lead; exclude it"
        )
    if not math.prod(value.shape):
        raise ValueError(f"{parameter.describe()} is empty and has no factors; exclude it")
    turned = left[0] > right[0] and left[0] > right[-1]
    if turned:
        left, right = right, left
    permuted = (*stack, *left, *right) != tuple(range(-ndim, 0))
    return Reading(tuple(value.shape), left, right, permuted, turned)
