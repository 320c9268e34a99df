"""An array that was rotated along the axes that products sum over."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxopt_compress.arrays.base import CompressedArray, describe, is_compressed, materialize
from jaxopt_compress.arrays.fields import check_axis, narrow_spec, pad_spec
from jaxopt_compress.arrays.leaf_types import compressed_array
from jaxopt_compress.numerics.hadamard import rotated
from jaxopt_compress.numerics.rounding import seal
from jaxopt_compress.typing import Leaf


@compressed_array(data=["array", "signs"], static=["axes"])
class RotatedArray(CompressedArray):
    """``R^T array``, of which products rotate the activation instead: ``(x R^T) (R W)``.

    ``R`` is a randomized Hadamard transform, which spreads outliers over all entries.

    Attributes:
        array: A compressed array, or a dense one.
        signs: Int8, 1 and -1, of the rank of the array; whole along ``axes``, and of size 1 or
            whole along others.
        axes: The negative axes along which the array was rotated.
    """

    array: Leaf
    signs: Leaf
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array.

        Raises:
            ValueError: The signs do not fit it.
        """
        shape, own = tuple(self.array.shape), tuple(self.signs.shape)
        fits = len(own) == len(shape) and all(-d <= len(shape) for d in self.axes)
        whole = fits and all(own[d] == shape[d] for d in self.axes)
        if not whole or any(n not in (1, m) for n, m in zip(own, shape, strict=True)):
            raise ValueError(
                f"a RotatedArray of an array of shape {shape} has signs of shape {own} for axes "
                f"{self.axes}: only leading axes can be mapped over or scanned (in_axes=0)"
            )
        return shape

    @property
    def dtype(self) -> np.dtype:  # pyright: ignore
        """The dtype of the array."""
        return jnp.dtype(self.array.dtype)

    @property
    def lost_when_dense(self) -> str:  # pyright: ignore
        """What the array would lose."""
        return getattr(self.array, "lost_when_dense", "")

    def check(self) -> None:
        """As in every compressed array."""
        if is_compressed(self.array):
            self.array.check()
        if self.signs.dtype != np.int8:
            raise ValueError(f"signs in {self.signs.dtype}; they are int8")
        for axis in self.axes:
            check_axis(axis, self.ndim)
        _ = self.shape

    def describe(self) -> str:
        """What the array is."""
        return f"{describe(self.array)} rotated"

    def materialize(self) -> jax.Array:
        """The dense array, rotated back and rounded once more."""
        _ = self.shape
        dense = materialize(self.array).astype(jnp.float32)
        return seal(rotated(dense, self.signs, self.axes, inverse=True, in_order=True), self.dtype)

    def specs(self, spec: PartitionSpec) -> "RotatedArray":
        """Those of the array; signs are split where they are as long."""
        entries = pad_spec(spec, self.ndim)
        signs = narrow_spec(entries, tuple(self.signs.shape))
        own = self.array.specs(spec) if is_compressed(self.array) else spec
        return self.replace(array=own, signs=signs)
