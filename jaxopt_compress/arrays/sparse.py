"""Kept values, and bits or distances that say where they go."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxopt_compress.arrays.base import CompressedArray, is_compressed
from jaxopt_compress.arrays.fields import (
    Distances,
    Packing,
    check_axis,
    check_length,
    is_traced,
    pad_spec,
)
from jaxopt_compress.arrays.leaf_types import compressed_array
from jaxopt_compress.arrays.not_an_array import INSTEAD
from jaxopt_compress.numerics import sparse
from jaxopt_compress.numerics.packing import pack_mask, unpack_mask
from jaxopt_compress.typing import Leaf


@compressed_array(data=["values", "words"], static=["pattern", "axis", "length", "core", "gaps"])
class SparseArray(CompressedArray):
    """Entries under a mask; zeros elsewhere.

    Two layouts. Unstructured: the ``core`` trailing axes are one row of entries, kept in row-major
    order, ``values`` are ``[*stack, 1, ..., capacity]`` and ``words`` ``[*stack, 1, ..., bytes]``;
    rows with fewer values than the fullest one are filled up with zeros. Where that is smaller,
    ``words`` are not bits but distances, of the shape of the values. N:m: each ``m`` consecutive
    entries along ``axis`` own ``n`` values, so every axis stays an axis.

    Attributes:
        values: The kept entries; floats, or the integer codes of a `QuantizedArray`.
        words: The mask, 8 entries to a uint8 word, the first one in the lowest bit. With ``gaps``
            how many entries are left out before each kept one, uint8, uint16 or uint32; those that
            fill up a row lead beyond its end.
        pattern: ``(n, m)``, or None if unstructured.
        axis: With a pattern: the negative axis of its groups, along which the mask is packed.
        length: With a pattern: the dense length of ``axis`` where it had to be filled up (it can
            then not be sharded), else None.
        core: Unstructured: the shape of the axes that make a row.
        gaps: Unstructured: whether words are distances.
    """

    values: Leaf
    words: Leaf
    pattern: tuple[int, int] | None = None
    axis: int | None = None
    length: int | None = None
    core: tuple[int, ...] = ()
    gaps: bool = False

    @property
    def dtype(self) -> np.dtype:  # pyright: ignore
        """The dtype of the values."""
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the mask.

        Raises:
            ValueError: Values and words do not fit each other.
        """
        words, values = tuple(self.words.shape), tuple(self.values.shape)
        if self.pattern is None:
            at = len(words) - len(self.core)
            last = values[-1] if self.gaps else -(-math.prod(self.core) // 8)
            row = (*(1,) * (len(self.core) - 1), last)
            fits = words[at:] == row and values[:-1] == words[:-1]
            dense = (*words[:at], *self.core)
        else:
            (n, m), at = self.pattern, len(words) + self._axis
            length = 8 * words[at] if self.length is None else self.length
            whole = self.length is not None or length % m == 0
            kept = (*words[:at], -(-length // m) * n, *words[at + 1 :])
            fits = whole and words[at] == -(-length // 8) and values == kept
            dense = (*words[:at], length, *words[at + 1 :])
        if not fits:
            raise ValueError(
                f"a SparseArray of {self.pattern or 'rows'} along {self.axis or self.core} does "
                f"not fit values {values} and words {words}: only leading axes can be mapped over "
                "or scanned (in_axes=0), and only whole groups and words can be cut off"
            )
        return dense

    @property
    def _axis(self) -> int:
        if self.axis is None or -self.axis > len(self.words.shape):
            raise ValueError(
                f"a SparseArray with fields of rank {len(self.words.shape)} has no axis "
                f"{self.axis}: only leading axes can be mapped over or scanned (in_axes=0)"
            )
        return self.axis

    def describe(self) -> str:
        """The pattern, and whether positions are distances."""
        if self.gaps:
            return "sparse gaps"
        return "sparse" if self.pattern is None else "sparse {}:{}".format(*self.pattern)

    def check(self) -> None:
        """As in every compressed array."""
        rank = len(self.words.shape)
        if not self._known_words() or is_compressed(self.values):
            raise ValueError(f"a mask of {self.words.dtype} and values {self.values!r}")
        if type(self.gaps) is not bool or (self.gaps and self.pattern is not None):
            raise ValueError(f"gaps={self.gaps!r} with the pattern {self.pattern}")
        if self.pattern is None:
            if not 1 <= len(self.core) <= rank or not all(type(n) is int for n in self.core):
                raise ValueError(f"the axes {self.core} of an array of rank {rank}")
            if (self.axis, self.length) != (None, None):
                raise ValueError(f"axis={self.axis} and length={self.length} without a pattern")
        else:
            n, m = self.pattern
            check_axis(self.axis, rank)
            check_length("n", n)
            check_length("m", m)
            if n >= m or self.core != ():
                raise ValueError(f"the pattern {self.pattern} with core={self.core}")
            if self.length is not None and type(self.length) is not int:
                raise ValueError(f"length={self.length!r}")
        _ = self.shape

    def stored_widths(self, bits: int | None) -> dict[str, int | None]:
        """Values may be codes of a `QuantizedArray`."""
        return {"values": bits}

    def packings(self) -> Mapping[str, Packing | Distances]:
        """Words of the mask, or distances."""
        if self.gaps:
            return {"words": Distances(math.prod(self.core), self.core[-1])}
        if self.pattern is None:
            return {"words": Packing(1, -1, 8, self.core[-1])}
        return {"words": Packing(1, self._axis, 8)}

    def kept(self) -> jax.Array:
        """The mask."""
        return self.mask()

    def mask(self) -> jax.Array:
        """Booleans of the dense shape: which entries are kept."""
        shape = self.shape
        self.check_dtypes()
        if self.pattern is not None:
            return unpack_mask(self.words, self._axis, self.length)
        return self._row_mask().reshape(shape)

    def materialize(self) -> jax.Array:
        """The values under the mask, zeros elsewhere; exact for every dtype."""
        shape = self.shape
        self.check_dtypes()
        if self.pattern is None:
            values = sparse.flatten_core(self.values, self._ones(self.values))
            return sparse.expand(values, self._row_mask()).reshape(shape)
        n, m = self.pattern
        axis = self._axis
        mask = sparse.fill_up(self.mask(), axis, m)
        dense = sparse.expand_nm(self.values, mask, n, m, axis)
        return jax.lax.slice_in_dim(dense, 0, shape[axis], axis=dense.ndim + axis)

    def check_dtypes(self) -> None:
        """Words of the mask are uint8, and distances unsigned."""
        if not self._known_words():
            raise TypeError(
                f"a SparseArray of shape {self.shape} has a mask in {self.words.dtype}, not uint8: "
                f"{INSTEAD}"
            )

    def _known_words(self) -> bool:
        return self.words.dtype in (sparse.GAP_DTYPES if self.gaps else sparse.GAP_DTYPES[:1])

    def _row_mask(self) -> jax.Array:
        words = sparse.flatten_core(self.words, self._ones(self.words))
        if self.gaps:
            return sparse.mask_of_gaps(words, math.prod(self.core))
        return unpack_mask(words, -1, math.prod(self.core))

    def _ones(self, x: jax.Array) -> tuple[int, ...]:
        return tuple(x.shape[x.ndim - len(self.core) :])

    def with_entries(self, dense: jax.Array) -> "SparseArray":
        """Other entries of the dense shape under the same mask; runs outside of jit."""
        if self.pattern is None:
            return sparse_rows(dense, self.mask(), len(self.core))
        return sparse_nm(dense, self.mask(), *self.pattern, self._axis)

    def specs(self, spec: PartitionSpec) -> "SparseArray":
        """Values and words are split like the dense array."""
        entries = pad_spec(spec, self.ndim)
        whole = entries[self.ndim - len(self.core) :] if self.pattern is None else ()
        if any(e is not None for e in whole):
            raise ValueError(
                f"an unstructured SparseArray of shape {self.shape} keeps the axes {self.core} in "
                f"one row and cannot be split by {spec}: split leading axes only, or prune n:m"
            )
        if self.length is not None and entries[self._axis] is not None:
            raise ValueError(
                f"axis {self.axis} of a SparseArray of shape {self.shape} was filled up from "
                f"{self.length} entries and cannot be split by {spec}"
            )
        return self.replace(values=PartitionSpec(*entries), words=PartitionSpec(*entries))


def sparse_rows(dense: jax.Array, mask: jax.Array, core_ndim: int) -> SparseArray:
    """Stores the entries under ``mask``, the trailing ``core_ndim`` axes as one row.

    Where they go is said by one bit for each entry, or by a distance for each kept one, whichever
    takes fewer bytes; arrays on several devices take bits. The number of stored values depends on
    the mask, so this runs outside of jit.

    Args:
        dense: Any dtype, any shape.
        mask: Booleans of the same shape.
        core_ndim: How many trailing axes make a row, at least one; the rest are stack axes.

    Raises:
        ValueError: ``core_ndim`` is no number of trailing axes.
    """
    if not 1 <= core_ndim <= dense.ndim:
        raise ValueError(f"core_ndim={core_ndim} of an array of shape {dense.shape}")
    if is_traced(mask):
        raise TypeError(
            "the number of entries that a sparse array keeps depends on its values: "
            "compress outside of jit"
        )
    core = tuple(dense.shape[dense.ndim - core_ndim :])
    kept = sparse.flatten_core(mask, core)
    capacity = int(jnp.max(jnp.sum(kept, -1), initial=0))
    if core_ndim == dense.ndim:
        # One row is the common case and needs no sort.
        values = _kept_entries(dense, _everywhere(mask))
    else:
        values = sparse.gather_kept(sparse.flatten_core(dense, core), kept, capacity)
    gaps = sparse.smaller_gaps(kept, capacity)
    if gaps is not None:
        # An array that may move to where others are stays one that may.
        words = jax.device_put(gaps, values.sharding if values.committed else None)
    else:
        words = pack_mask(kept, -1)
        words = _everywhere(words) if core_ndim == dense.ndim else words
    ones = (1,) * (core_ndim - 1)

    def lift(x):
        return x.reshape(*x.shape[:-1], *ones, x.shape[-1])

    return SparseArray(lift(values), lift(words), core=core, gaps=gaps is not None)


def _kept_entries(dense: jax.Array, mask: jax.Array) -> jax.Array:
    """The entries under a mask, in row-major order."""
    if len(dense.devices()) == 1:
        # NumPy needs neither a flat copy nor positions, which take more than the entries.
        kept = np.asarray(dense)[np.asarray(mask)]
        device = next(iter(dense.devices())) if dense.committed else None
        return jax.device_put(kept, device)
    at = np.flatnonzero(np.asarray(mask))
    return _everywhere(jnp.take(dense.reshape(-1), at, axis=0))


def _everywhere(x: jax.Array) -> jax.Array:
    """The same array, as a copy on each device where no process holds all of it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return x
    return jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))  # pyright: ignore


def sparse_nm(dense: jax.Array, mask: jax.Array, n: int, m: int, axis: int) -> SparseArray:
    """Stores the entries under an n:m mask; jit-able.

    Args:
        dense: Any dtype, any shape.
        mask: Booleans of the same shape, at most ``n`` true among each ``m`` along ``axis``.
        n: Values per group.
        m: Entries per group.
        axis: The negative axis of the groups.
    """
    length = dense.shape[axis]
    values = sparse.gather_kept_nm(
        sparse.fill_up(dense, axis, m), sparse.fill_up(mask, axis, m), n, m, axis
    )
    exact = length % 8 == 0 and length % m == 0
    words = pack_mask(mask, axis)
    return SparseArray(values, words, (n, m), axis, None if exact else length)
