"""Dense values under a mask: the view of a pruned parameter."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays.base import CompressedArray
from jaxopt_compress.arrays.leaf_types import compressed_array


@compressed_array(data=["values", "mask"], stored=False)
class MaskedArray(CompressedArray):
    """``where(mask, values, 0)``.

    Attributes:
        values: A dense array.
        mask: Booleans of its shape, true where an entry is kept.
    """

    values: Any
    mask: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return tuple(self.values.shape)

    @property
    def dtype(self) -> np.dtype:  # pyright: ignore
        """The dtype of the values."""
        return self.values.dtype

    def kept(self) -> jax.Array:
        """The mask."""
        return self.mask

    def describe(self) -> str:
        """That there is a mask."""
        return "masked"

    def materialize(self) -> jax.Array:
        """The values under the mask, 0.0 elsewhere."""
        return jnp.where(self.mask, self.values, jnp.zeros((), self.values.dtype))
