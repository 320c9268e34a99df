"""Dense values under a mask: the view of a pruned parameter."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxopt_compress.arrays.base import CompressedArray


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "mask"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
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

    def materialize(self) -> jax.Array:
        """The values under the mask, 0.0 elsewhere."""
        return jnp.where(self.mask, self.values, jnp.zeros((), self.values.dtype))

    def specs(self, spec: PartitionSpec) -> "MaskedArray":
        """Values and mask are split like the dense array."""
        return self.replace(values=spec, mask=spec)
