"""The mask of a pruned parameter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import (
    CodebookArray,
    MaskedArray,
    QuantizedArray,
    SparseArray,
    is_compressed,
    materialize,
)
from jaxopt_compress.arrays.sparse import sparse_nm, sparse_rows
from jaxopt_compress.compression import LeafState, Parameter
from jaxopt_compress.compression.leaf_states import GRID, N_M, RANK, ZEROS
from jaxopt_compress.numerics.ordering import computed_after
from jaxopt_compress.typing import Leaf, PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mask", "threshold", "kept", "growing"],
    meta_fields=["pattern", "axis", "stack", "straight_through", "zero", "flops"],
)
@dataclasses.dataclass(frozen=True)
class PrunedState(LeafState):
    """The mask of one parameter.

    Attributes:
        mask: Booleans, true where an entry is kept.
        threshold: The score that separated them, one per pool of entries that are compared with
            each other; where the next search starts. None where nothing is searched.
        kept: Arrays that the score needs besides the parameter, or None.
        growing: Arrays that the growth rule needs, or None.
        pattern: ``(n, m)``, or None.
        axis: The negative axis of the groups of an n:m pattern, or None.
        stack: How many leading axes hold parameters of their own.
        straight_through: Whether pruned entries get gradients.
        zero: Whether training sets pruned entries, and their moments, to 0.
        flops: The operations of its products, where a distribution may ask for them.
    """

    mask: Leaf
    threshold: Leaf
    kept: PyTree
    growing: PyTree
    pattern: tuple[int, int] | None
    axis: int | None
    stack: int
    straight_through: bool = False
    zero: bool = False
    flops: int | None = None
    kind = "prune"
    keeps = frozenset({ZEROS, N_M, RANK, GRID})

    @property
    def establishes(self) -> frozenset[str]:
        """Zeros, and perhaps a pattern of them."""
        return frozenset({ZEROS} if self.pattern is None else {ZEROS, N_M})

    def apply(self, w: Leaf, learned: PyTree) -> MaskedArray:
        """``w`` under the mask."""
        del learned
        return MaskedArray(materialize(w), self.mask, self.straight_through)

    def before(self, g: jax.Array) -> jax.Array:
        """``g`` itself, computed after the mask."""
        if self.threshold is None:
            return g
        return computed_after(g, self.threshold)

    def rests(self) -> jax.Array | None:
        """The pruned entries, if these are to be 0 in the parameter itself."""
        return ~self.mask if self.zero else None

    def compress(self, w: Leaf, learned: PyTree, path: str) -> Leaf:
        """The kept entries; of an array of codes, the kept codes."""
        del learned, path
        if isinstance(w, QuantizedArray) or (isinstance(w, CodebookArray) and w.vector == 1):
            return w.replace(codes=self._store(w.unpacked()), block=None)
        return self._store(materialize(w))

    def _store(self, dense: jax.Array) -> Leaf:
        if self.pattern is not None and not bool(jnp.all(self.mask)):
            return sparse_nm(dense, self.mask, *self.pattern, self.axis)  # pyright: ignore
        return store_kept(dense, self.mask, self.stack)


def store_kept(dense: jax.Array, mask: jax.Array, stack: int) -> SparseArray:
    """Entries under a mask, each entry of the leading axes as a row."""
    return sparse_rows(dense, mask, dense.ndim - stack)


def leading_stack(parameter: Parameter) -> int:
    """How many leading axes hold parameters of their own; at least one axis is left."""
    rank, apart = len(parameter.value.shape), parameter.layout.stack
    return next((d for d in range(rank) if d - rank not in apart), rank - 1)


def check_prunable(parameter: Parameter) -> None:
    """Refuses what has no entries to tell apart.

    Raises:
        TypeError: A compressed array that is no view of a chain.
        ValueError: A scalar.
    """
    value = parameter.value
    if is_compressed(value) and not isinstance(value, (QuantizedArray, MaskedArray)):
        raise TypeError(
            f"{parameter.describe()} is a {type(value).__name__} and cannot be pruned; prune "
            "before, or materialize it first"
        )
    if not value.shape:
        raise ValueError(f"{parameter.describe()} is a scalar and cannot be pruned; exclude it")
