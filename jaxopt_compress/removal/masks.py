"""The masked parameters, as a compression."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import MaskedArray, QuantizedArray, is_compressed, materialize
from jaxopt_compress.arrays.sparse import sparse_rows
from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    LeafState,
    Parameter,
    compression_of,
    spelled,
)
from jaxopt_compress.compression.leaf_states import GRID, N_M, RANK, ZEROS
from jaxopt_compress.typing import Leaf, PyTree


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kept"], meta_fields=["kind", "stack"]
)
@dataclasses.dataclass(frozen=True)
class MaskedState(LeafState):
    """Which indices of a parameter stay.

    Attributes:
        kept: Per axis, booleans, true where an index stays.
        stack: How many leading axes hold parameters of their own.
    """

    kept: tuple[Leaf, ...]
    stack: int = 0
    kind: str = "remove"
    establishes = frozenset({ZEROS})
    keeps = frozenset({ZEROS, N_M, RANK, GRID})

    def mask(self) -> jax.Array:
        """Booleans of the parameter's shape, true where all of an entry's indices stay."""
        rank = len(self.kept)
        shaped = (
            jnp.asarray(k).reshape([-1 if i == d else 1 for i in range(rank)])
            for d, k in enumerate(self.kept)
        )
        return functools.reduce(jnp.logical_and, shaped)

    def apply(self, w: Leaf, learned: PyTree) -> MaskedArray:
        """``w``, and 0 where an index goes."""
        del learned
        return MaskedArray(materialize(w), self.mask())

    def compress(self, w: Leaf, learned: PyTree, path: str) -> Leaf:
        """The kept entries; of a quantized array, the kept codes."""
        del learned, path
        if isinstance(w, QuantizedArray):
            codes = w.unpacked()
            return w.replace(codes=self._store(codes), block=None)
        return self._store(materialize(w))

    def _store(self, dense: jax.Array) -> Leaf:
        return sparse_rows(dense, self.mask(), dense.ndim - self.stack)


def masks(gone: Mapping[str, tuple[np.ndarray, ...]]) -> Compression:
    """The compression that sets the entries at some indices to zero, and stores the others.

    Args:
        gone: Path -> per axis, booleans, true where an index goes.
    """

    def check(parameter: Parameter) -> None:
        shape = tuple(map(len, gone[parameter.path]))
        if tuple(parameter.value.shape) != shape:
            raise ValueError(f"{parameter.describe()} had shape {shape} when groups were found")
        if is_compressed(parameter.value) and not isinstance(
            parameter.value, (MaskedArray, QuantizedArray)
        ):
            raise TypeError(
                f"{parameter.describe()} is a {type(parameter.value).__name__}, which has no "
                "indices to mask; mask before, or materialize it first"
            )

    def init(parameter: Parameter) -> Decision:
        kept = tuple(jnp.asarray(~flags) for flags in gone[parameter.path])
        ndim = len(kept)
        stacked = (d for d in range(ndim) if d - ndim not in parameter.layout.stack)
        return Decision(MaskedState(kept, next(stacked, ndim - 1)))

    where = lambda path, leaf: path in gone
    return compression_of(LeafMethod(check, init), where, asked=spelled("remove", _digest(gone)))


def _digest(gone: Mapping[str, tuple[np.ndarray, ...]]) -> str:
    """A short name for some indices, so that the state of another plan is not taken for this."""
    found = hashlib.sha256()
    for path, flags in sorted(gone.items()):
        found.update(path.encode())
        for own in flags:
            found.update(np.packbits(own).tobytes())
    return found.hexdigest()[:8]
