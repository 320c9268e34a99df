"""Integer codes with a scale per tensor, channel or group."""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxopt_compress.arrays.base import CompressedArray, narrow_spec, pad_spec, stored_bytes
from jaxopt_compress.arrays.sparse import SparseArray
from jaxopt_compress.numerics.formats import decode
from jaxopt_compress.numerics.groups import spread
from jaxopt_compress.numerics.packing import unpack


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "zero"],
    meta_fields=["dtype", "bits", "axis", "group", "block"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray(CompressedArray):
    """``(codes - zero) * scale``.

    Attributes:
        codes: Integers of the dense shape: int8 or int4; or uint8 words, shorter along ``axis``
            (`numerics.packing`); or a `SparseArray` of int8 or int4.
        scale: Float32, of the rank of ``codes``; along each axis of size 1, of the dense size, or,
            along ``axis`` when there are groups, one per group.
        zero: Integer zero points of the shape of ``scale``, or None. 0.0 has an exact code.
        dtype: The floating dtype of the dense array.
        bits: Stored bits per code.
        axis: The negative axis along which codes are grouped and packed; None for a scalar.
        group: Consecutive entries along ``axis`` that share a scale, or None.
        block: Entries along ``axis`` per block of packed words, or None if codes are not packed.
    """

    codes: Any
    scale: Any
    zero: Any
    dtype: np.dtype
    bits: int
    axis: int | None
    group: int | None = None
    block: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes, unpacked.

        Raises:
            ValueError: Codes, scales and zero points do not fit each other.
        """
        shape, scale = list(self.codes.shape), tuple(self.scale.shape)
        at = 0 if self.axis is None else len(shape) + self.checked_axis
        if self.block is not None:
            shape[at] = shape[at] * 8 // self.bits
        sizes: list[tuple[int, ...]] = [(1, n) for n in shape]
        if self.group is not None:
            groups, rest = divmod(shape[at], self.group)
            # One group may be split over devices, which then hold copies of its scale.
            sizes[at] = (groups,) if rest == 0 else (1,) if groups == 0 else ()
        fits = len(scale) == len(sizes) and all(map(operator.contains, sizes, scale))
        if not fits or (self.zero is not None and tuple(self.zero.shape) != scale):
            zero = "" if self.zero is None else f" and zero points {tuple(self.zero.shape)}"
            raise ValueError(
                f"a QuantizedArray of shape {tuple(shape)} does not fit scales {scale}{zero} with "
                f"group={self.group} along axis {self.axis}: only leading axes can be mapped over "
                "or scanned (in_axes=0), and only whole groups can be cut off"
            )
        return tuple(shape)

    @property
    def checked_axis(self) -> int:
        """``axis``, once it is sure that the fields still have it."""
        if self.axis is None or -self.axis > len(self.codes.shape):
            raise ValueError(
                f"a QuantizedArray with fields of rank {len(self.codes.shape)} has no axis "
                f"{self.axis}: only leading axes can be mapped over or scanned (in_axes=0)"
            )
        return self.axis

    def integers(self) -> jax.Array:
        """The codes of the dense shape, one per entry, as int8 or int4.

        Raises:
            TypeError: Something has been done to codes or scales as if they were parameters.
        """
        kinds = {"codes": self.codes.dtype, "scales": self.scale.dtype}
        if not jnp.issubdtype(kinds["codes"], jnp.integer) or kinds["scales"] != jnp.float32:
            raise TypeError(
                f"a QuantizedArray of shape {tuple(self.codes.shape)} has {kinds['codes']} codes "
                f"and {kinds['scales']} scales, not integers and float32: map over the floats of "
                "jaxopt_compress.partition(tree) instead of the whole tree"
            )
        if isinstance(self.codes, SparseArray):
            return self.codes.materialize()
        if self.block is None:
            return self.codes
        return unpack(self.codes, self.bits, self.checked_axis, self.block)

    def per_entry(self, field: jax.Array) -> jax.Array:
        """``scale`` or ``zero`` in a shape that broadcasts against the dense one."""
        if self.group is None or field.shape[self.checked_axis] == 1:
            return field
        return spread(field, self.checked_axis, self.group)

    def materialize(self) -> jax.Array:
        """``(codes - zero) * scale`` in float32, rounded once to ``dtype``."""
        _ = self.shape
        levels = self.integers().astype(jnp.int32)
        if self.zero is not None:
            levels = levels - self.per_entry(self.zero).astype(jnp.int32)
            if isinstance(self.codes, SparseArray):
                levels = jnp.where(self.codes.mask(), levels, 0)
        return decode(levels, self.per_entry(self.scale), self.dtype)

    @property
    def nbytes(self) -> int:
        """As in every compressed array, where codes of 2 bits may fill bytes only in memory."""
        total = super().nbytes
        codes = self.codes.values if isinstance(self.codes, SparseArray) else self.codes
        if codes is None or self.block is not None:
            return total
        return total - stored_bytes(codes) - (-math.prod(codes.shape) * self.bits // 8)

    def specs(self, spec: PartitionSpec) -> "QuantizedArray":
        """Codes are split like the dense array, scales and zero points where they are as long."""
        entries = pad_spec(spec, self.ndim)
        scale = narrow_spec(entries, tuple(self.scale.shape))
        if self.block is not None and entries[self.checked_axis] is not None:
            if self.shape[self.checked_axis] == self.block:
                raise ValueError(
                    f"a QuantizedArray of shape {self.shape} is packed in one block along axis "
                    f"{self.axis} and cannot be split by {spec}: pack it in smaller blocks, or "
                    "split other axes"
                )
        sparse = isinstance(self.codes, SparseArray)
        codes = self.codes.specs(spec) if sparse else PartitionSpec(*entries)
        return self.replace(codes=codes, scale=scale, zero=None if self.zero is None else scale)


def store_codes(codes: jax.Array, bits: int) -> jax.Array:
    """Codes in the dtype that holds ``bits`` bits in memory: native int4, else int8."""
    return codes.astype(jnp.int4 if bits == 4 else jnp.int8)
