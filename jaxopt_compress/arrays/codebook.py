"""Codes, and the values that entries of the same code share."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxopt_compress.arrays.base import CompressedArray, is_compressed
from jaxopt_compress.arrays.coded import CodedArray
from jaxopt_compress.arrays.fields import check_axis, check_length, narrow_spec, pad_spec
from jaxopt_compress.arrays.leaf_types import compressed_array
from jaxopt_compress.arrays.not_an_array import INSTEAD
from jaxopt_compress.arrays.sparse import SparseArray
from jaxopt_compress.numerics.packing import layout
from jaxopt_compress.numerics.shared import values_of
from jaxopt_compress.typing import Leaf

_CENTROIDS = ("float32", "bfloat16", "float16")


@compressed_array(
    data=["codes", "centroids"], static=["dtype", "clusters", "axis", "vector", "block"]
)
class CodebookArray(CodedArray):
    """``centroids[codes]``.

    Attributes:
        codes: Unsigned integers, one for each ``vector`` entries along ``axis``: uint4 for codes of
            4 bits, else uint8 or uint16; or uint8 words, shorter along ``axis``
            (`numerics.packing`); or a `SparseArray` of codes, for entries that are 0.0 elsewhere.
        centroids: Floating, of the rank of the dense array. Along ``axis`` the entries of
            ``clusters`` vectors, for each group of equally many entries; along others of the dense
            size, where each index has codebooks of its own, or of size 1.
        dtype: The floating dtype of the dense array.
        clusters: Vectors per codebook.
        axis: The negative axis along which vectors and groups run, and codes are packed.
        vector: Entries per code.
        block: Codes along ``axis`` per block of packed words, or None if they are not packed.
    """

    codes: Leaf
    centroids: Leaf
    dtype: np.dtype
    clusters: int
    axis: int
    vector: int = 1
    block: int | None = None

    @property
    def bits(self) -> int:
        """Stored bits per code."""
        return code_bits(self.clusters)

    @property
    def groups(self) -> int:
        """Codebooks along ``axis``."""
        return self.centroids.shape[self.axis] // (self.clusters * self.vector)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes, unpacked, times the length of vectors.

        Raises:
            ValueError: Codes and centroids do not fit each other.
        """
        rank, centroids = len(self.codes.shape), list(self.centroids.shape)
        if rank < -self.axis or rank != len(centroids):
            raise ValueError(self._misfit())
        (codes, whole), at = self.lengths(), rank + self.axis
        groups, rest = divmod(centroids[at], self.clusters * self.vector)
        others = [d for d in range(len(codes)) if d != at]
        whole = whole and not rest and groups >= 1 and codes[at] % groups == 0
        if not whole or any(centroids[d] not in (1, codes[d]) for d in others):
            raise ValueError(self._misfit())
        codes[at] *= self.vector
        return tuple(codes)

    def _misfit(self) -> str:
        return (
            f"a CodebookArray of {tuple(self.codes.shape)} codes does not fit centroids "
            f"{tuple(self.centroids.shape)} with clusters={self.clusters}, vector={self.vector} "
            f"and block={self.block} along axis {self.axis}: only leading axes can be mapped over "
            "or scanned (in_axes=0), and only whole groups can be cut off"
        )

    def describe(self) -> str:
        """How many clusters, of vectors of how many entries."""
        vector = "" if self.vector == 1 else f" of {self.vector}"
        own = f"{self.clusters} clusters{vector}"
        sparse = isinstance(self.codes, SparseArray)
        return f"{self.codes.describe()} + {own}" if sparse else own

    def check(self) -> None:
        """As in every compressed array."""
        check_axis(self.axis, len(self.codes.shape))
        for name in ("clusters", "vector"):
            check_length(name, getattr(self, name))
        if not 2 <= self.clusters <= 2**16:
            raise ValueError(f"clusters={self.clusters}")
        self.check_words()
        if self.block is not None and is_compressed(self.codes):
            raise ValueError(f"sparse codes in blocks of {self.block}")
        if is_compressed(self.codes) and self.vector > 1:
            raise ValueError(f"sparse codes of vectors of {self.vector}")
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"values of {self.dtype}")
        if self.codes.dtype != self._held or self.centroids.dtype.name not in _CENTROIDS:
            raise ValueError(f"{self.codes.dtype} codes and {self.centroids.dtype} centroids")
        _ = self.shape

    @property
    def _held(self) -> np.dtype:
        return np.dtype(np.uint8) if self.block is not None else code_dtype(self.clusters)

    def stored_widths(self, bits: int | None) -> dict[str, int | None]:
        """Codes may fill bytes in memory; only the number of clusters tells their width."""
        del bits
        return {"codes": self.bits if self.block is None and self.bits <= 8 else None}

    def check_dtypes(self) -> None:
        """Codes are unsigned, and centroids floating."""
        if self.codes.dtype != self._held or self.centroids.dtype.name not in _CENTROIDS:
            raise TypeError(
                f"a CodebookArray of shape {tuple(self.codes.shape)} has {self.codes.dtype} codes "
                f"and {self.centroids.dtype} centroids, not {self._held} and one of "
                f"{', '.join(_CENTROIDS)}: {INSTEAD}"
            )
        if isinstance(self.codes, CompressedArray):
            self.codes.check_dtypes()

    def materialize(self) -> jax.Array:
        """The centroids, rounded to ``dtype``, in the place of their codes."""
        _ = self.shape
        how = (self.dtype, self.axis, self.clusters, self.vector)
        values = values_of(self.unpacked(), self.centroids, *how)
        mask = self.kept()
        return values if mask is None else jnp.where(mask, values, jnp.zeros((), self.dtype))

    def specs(self, spec: PartitionSpec) -> "CodebookArray":
        """Codes are split like the dense array, centroids where each index has its own."""
        entries = pad_spec(spec, self.ndim)
        codes = self.codes_spec(spec, entries, self.block and self.block * self.vector)
        along = entries[self.axis]
        books = list(entries)
        books[self.axis] = None if self.groups == 1 else along
        sizes = list(self.centroids.shape)
        sizes[self.axis] = 1 if self.groups == 1 else self.groups
        return self.replace(codes=codes, centroids=narrow_spec(tuple(books), tuple(sizes)))


def code_bits(clusters: int) -> int:
    """Bits of a code of one of so many clusters.

    Example:
        >>> [code_bits(n) for n in (2, 3, 16, 17)]
        [1, 2, 4, 5]
    """
    return max(1, (clusters - 1).bit_length())


def code_dtype(clusters: int) -> np.dtype:
    """What holds codes that are not in words."""
    bits = code_bits(clusters)
    if bits == 4:
        return jnp.dtype(jnp.uint4)
    return np.dtype(np.uint8 if bits <= 8 else np.uint16)


def codes_block(length: int, clusters: int) -> int | None:
    """Codes per block of words along an axis of so many; None where they are not packed."""
    bits = code_bits(clusters)
    if bits in (4, 8) or bits > 8 or not length or length % layout(bits).runs:
        return None
    return math.gcd(length, 128)
