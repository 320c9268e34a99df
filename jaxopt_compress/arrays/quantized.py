"""Codes of a number format, with a step per tensor, channel, group or tile."""

import operator
from typing import Any

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
from jaxopt_compress.numerics.codes import decode, levels_of
from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.numerics.groups import Cuts, cuts_of, spread_to
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.steps import STEP_DTYPES, step_value, zero_dtype
from jaxopt_compress.typing import Leaf


@compressed_array(
    data=["codes", "scale", "zero"],
    static=["dtype", "format", "axis", "group_size", "block", "tile"],
)
class QuantizedArray(CodedArray):
    """``(level(codes) - zero) * scale``.

    Attributes:
        codes: One per entry, in the dtype of the format (integers, 8-bit floats, or bit patterns in
            uint4 and uint8); or uint8 words, shorter along ``axis`` (`numerics.packing`); or a
            `SparseArray` of codes.
        scale: The step: float32, bfloat16, float16 or float8_e8m0fnu, or a `QuantizedArray` of
            float8_e4m3fn steps; of the rank of ``codes``; along each axis of size 1, of the dense
            size, or one per group or tile.
        zero: Integer zero points of the shape of ``scale``, or None. 0.0 has an exact code.
        dtype: The floating dtype of the dense array.
        format: The name of the number format, one of those that `quantize` lists.
        axis: The negative axis along which codes are grouped and packed; None for a scalar.
        group_size: Consecutive entries along ``axis`` that share a scale, or None; the last group
            may be shorter.
        block: Entries along ``axis`` per block of packed words, or None if codes are not packed.
        tile: ``(negative axis, entries)`` of a second axis that is cut into groups, or None.
    """

    codes: Leaf
    scale: Leaf
    zero: Leaf
    dtype: np.dtype
    format: str
    axis: int | None
    group_size: int | None = None
    block: int | None = None
    tile: tuple[int, int] | None = None

    @property
    def fmt(self) -> Format:
        """The number format."""
        return format_of(self.format)

    @property
    def bits(self) -> int:
        """Stored bits per code."""
        return self.fmt.bits

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes, unpacked.

        Raises:
            ValueError: Codes, steps and zero points do not fit each other.
        """
        (shape, whole), scale = self.lengths(), tuple(self.scale.shape)
        sizes: list[tuple[int, ...]] = [(1, n) for n in shape]
        for d, group in self.cuts:
            # A group may be split over devices, which then hold copies of its step.
            sizes[d] = (-(-shape[d] // group),)
        fits = whole and len(scale) == len(sizes) and all(map(operator.contains, sizes, scale))
        if not fits or (self.zero is not None and tuple(self.zero.shape) != scale):
            zero = "" if self.zero is None else f" and zero points {tuple(self.zero.shape)}"
            raise ValueError(
                f"a QuantizedArray of shape {tuple(shape)} does not fit scales {scale}{zero} with "
                f"group_size={self.group_size} and block={self.block} along axis {self.axis}: only "
                "leading axes can be mapped over or scanned (in_axes=0), and only whole groups can "
                "be cut off"
            )
        return tuple(shape)

    def describe(self) -> str:
        """The format, groups of its own, and zero points."""
        own = self.tile is None and self.group_size == self.fmt.group
        cuts = [self.group_size, *(self.tile or ())[1:]]
        group = "" if own or self.group_size is None else f" g{'x'.join(map(str, cuts))}"
        asymmetric = self.zero is not None and self.fmt.grid.signed
        grid = f"{self.format}{group}{' asymmetric' if asymmetric else ''}"
        sparse = isinstance(self.codes, SparseArray)
        return f"{self.codes.describe()} + {grid}" if sparse else grid

    def check(self) -> None:
        """As in every compressed array; codes and steps have the dtypes that formats know."""
        if not isinstance(self.format, str) or not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"format {self.format!r}, of {self.dtype}")
        fmt, codes, rank = self.fmt, self.codes, len(self.codes.shape)
        check_axis(self.axis, rank, absent=self.group_size is None and self.block is None)
        if self.group_size is not None:
            check_length("group_size", self.group_size)
        if self.tile is not None:
            axis, length = self.tile
            check_axis(axis, rank)
            check_length("tile", length)
        self.check_words()
        held = fmt.dtype if self.block is None else np.dtype(np.uint8)
        if codes.dtype != held or (is_compressed(codes) and self.block is not None):
            raise ValueError(f"{codes.dtype} codes of {self.format}, which are {held}")
        if self.scale.dtype.name not in STEP_DTYPES:
            raise ValueError(f"{self.scale.dtype} scales, not one of {', '.join(STEP_DTYPES)}")
        if self.zero is not None and self.zero.dtype != zero_dtype(fmt):
            raise ValueError(f"{self.zero.dtype} zero points, which are {zero_dtype(fmt)}")
        if self.zero is not None and not isinstance(fmt.grid, Integers):
            raise ValueError(f"zero points of {self.format}")
        _ = self.shape

    def stored_widths(self, bits: int | None) -> dict[str, int | None]:
        """Codes may fill bytes in memory; only the format knows their width."""
        del bits
        return {"codes": self.bits if self.block is None else None}

    @property
    def cuts(self) -> Cuts:
        """The axes that are cut into groups."""
        return cuts_of(self.axis, self.group_size, self.tile)

    def check_dtypes(self) -> None:
        """Codes have the dtype of the format, and scales one that scales may have."""
        held = np.uint8 if self.block is not None else self.fmt.dtype
        if self.codes.dtype != held or self.scale.dtype.name not in STEP_DTYPES:
            raise TypeError(
                f"a QuantizedArray of shape {tuple(self.codes.shape)} has {self.codes.dtype} codes "
                f"and {self.scale.dtype} scales, not {np.dtype(held)} and one of "
                f"{', '.join(STEP_DTYPES)}: {INSTEAD}"
            )
        if isinstance(self.codes, CompressedArray):
            self.codes.check_dtypes()

    @property
    def signed(self) -> bool:
        """Whether codes are signed integers."""
        return self.fmt.grid.signed

    def steps(self) -> jax.Array:
        """``scale`` in float32."""
        return steps_of(self.scale)

    def per_entry(self, field: jax.Array) -> jax.Array:
        """Steps or zero points in a shape that broadcasts against the dense one."""
        return spread_to(field, self.cuts, self.shape)

    def levels(self) -> jax.Array:
        """``level(codes) - zero`` of the dense shape, exact in float32."""
        _ = self.shape  # Checked before anything is unpacked.
        codes = self.unpacked()
        if isinstance(self.fmt.grid, Integers):
            levels = codes.astype(jnp.int32)
            if self.zero is not None:
                levels = levels - self.per_entry(self.zero).astype(jnp.int32)
            levels = levels.astype(jnp.float32)
        else:
            levels = levels_of(codes, self.fmt)
        return jnp.where(self.codes.mask(), levels, 0) if self.masked else levels

    @property
    def masked(self) -> bool:
        """Whether codes stand under a mask and a code of zero does not stand for 0.0."""
        plain = isinstance(self.fmt.grid, Integers) and self.zero is None
        return isinstance(self.codes, SparseArray) and not plain

    def materialize(self) -> jax.Array:
        """``(level(codes) - zero) * scale`` in float32, rounded once to ``dtype``."""
        return decode(self.levels(), self.per_entry(self.steps()), self.dtype)

    def specs(self, spec: PartitionSpec) -> "QuantizedArray":
        """Codes are split like the dense array, steps and zero points where they are as long."""
        entries = pad_spec(spec, self.ndim)
        self._check_split(entries, spec)
        steps = lambda x: None if x is None else narrow_spec(entries, tuple(x.shape))
        nested = is_compressed(self.scale)
        scale = self.scale.specs(steps(self.scale)) if nested else steps(self.scale)
        codes = self.codes_spec(spec, entries, self.block)
        return self.replace(codes=codes, scale=scale, zero=steps(self.zero))

    def _check_split(self, entries: tuple[Any, ...], spec: PartitionSpec) -> None:
        shape = self.shape
        for axis, group in self.cuts:
            if shape[axis] % group and entries[axis] is not None:
                raise ValueError(
                    f"axis {axis} of a QuantizedArray of shape {shape} ends in a group of less "
                    f"than {group} entries and cannot be split by {spec}: split other axes"
                )


def steps_of(scale: Leaf) -> jax.Array:
    """Stored steps, an array or a `QuantizedArray`, in float32."""
    return scale.materialize() if is_compressed(scale) else step_value(scale)
