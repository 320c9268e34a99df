"""Codes that may be sparse, or packed in words: shared by the arrays that hold some."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxopt_compress.arrays.base import CompressedArray, is_compressed, stored_bytes
from jaxopt_compress.arrays.fields import Packing, check_length
from jaxopt_compress.arrays.sparse import SparseArray
from jaxopt_compress.numerics.packing import layout, unpack
from jaxopt_compress.typing import Leaf


class CodedArray(CompressedArray):
    """The base of arrays of codes.

    Attributes:
        codes: Codes; or uint8 words, shorter along ``axis`` (`numerics.packing`); or a
            `SparseArray` of codes.
        dtype: The floating dtype of the dense array.
        axis: The negative axis along which codes are packed, or None where there is none.
        block: Codes along ``axis`` per block of packed words, or None if they are not packed.
    """

    codes: Leaf
    dtype: np.dtype
    axis: int | None
    block: int | None

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    @property
    def bits(self) -> int:
        """Stored bits per code."""
        raise NotImplementedError

    @property
    def checked_axis(self) -> int:
        """``axis``, once it is sure that the fields still have it."""
        if self.axis is None or -self.axis > len(self.codes.shape):
            raise ValueError(
                f"a {type(self).__name__} with fields of rank {len(self.codes.shape)} has no axis "
                f"{self.axis}: only leading axes can be mapped over or scanned (in_axes=0)"
            )
        return self.axis

    def lengths(self) -> tuple[list[int], bool]:
        """The shape of the codes, unpacked, and whether words hold whole blocks of them."""
        shape, at = list(self.codes.shape), None if self.axis is None else self.checked_axis
        if self.block is None or at is None:
            return shape, True
        shape[at], rest = divmod(shape[at] * 8, self.bits)
        return shape, not rest and shape[at] % self.block == 0

    def check_words(self) -> None:
        """Raises ValueError for blocks that no words hold."""
        if self.block is None:
            return
        check_length("block", self.block)
        if self.bits > 7 or self.block % layout(self.bits).runs:
            raise ValueError(f"{self.bits} bits in blocks of {self.block}")

    @property
    def signed(self) -> bool:
        """Whether packed codes are signed integers."""
        return False

    def unpacked(self) -> jax.Array:
        """The codes, one by one.

        Raises:
            TypeError: Something has been done to the fields as if they were parameters.
        """
        self.check_dtypes()
        if isinstance(self.codes, SparseArray):
            return self.codes.materialize()
        if self.block is None:
            return self.codes
        return unpack(self.codes, self.bits, self.checked_axis, self.block, self.signed)

    def packings(self) -> dict[str, Packing]:
        """The packing of words of codes."""
        if self.block is None:
            return {}
        return {"codes": Packing(self.bits, self.checked_axis, self.block)}

    def kept(self) -> jax.Array | None:
        """The mask of sparse codes."""
        return self.codes.mask() if isinstance(self.codes, SparseArray) else None

    @property
    def nbytes(self) -> int:
        """As in every compressed array, where codes of less than a byte may fill one in memory."""
        total = super().nbytes
        codes = self.codes.values if isinstance(self.codes, SparseArray) else self.codes
        if codes is None or self.block is not None or self.bits > 8:
            return total
        return total - stored_bytes(codes) - (-math.prod(codes.shape) * self.bits // 8)

    def codes_spec(self, spec: PartitionSpec, entries: tuple[Any, ...], block: int | None) -> Leaf:
        """How codes are split like the dense array.

        Args:
            spec: The split of the dense array.
            entries: The same for each of its axes.
            block: Entries of the dense array per block of words, or None.

        Raises:
            ValueError: All words are one block, which cannot be split.
        """
        if block is not None and entries[self.checked_axis] is not None:
            if self.shape[self.checked_axis] == block:
                raise ValueError(
                    f"a {type(self).__name__} of shape {self.shape} is packed in one block along "
                    f"axis {self.axis} and cannot be split by {spec}: pack it in smaller blocks, "
                    "or split other axes"
                )
        return self.codes.specs(spec) if is_compressed(self.codes) else PartitionSpec(*entries)
