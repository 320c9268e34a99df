"""Dense values under a mask: the view of a pruned parameter."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays.base import CompressedArray
from jaxopt_compress.arrays.leaf_types import compressed_array
from jaxopt_compress.typing import Leaf, PyTree


@compressed_array(data=["values", "mask"], training=["straight_through"], stored=False)
class MaskedArray(CompressedArray):
    """``where(mask, values, 0)``.

    Attributes:
        values: A dense array.
        mask: Booleans of its shape, true where an entry is kept.
        straight_through: Whether entries that are not kept have the derivative 1 instead of 0.
    """

    values: Leaf
    mask: Leaf
    straight_through: bool = False

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
        return (_through if self.straight_through else _masked)(self.values, self.mask)


def _masked(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, values, jnp.zeros((), values.dtype))


@jax.custom_jvp
def _through(values: jax.Array, mask: jax.Array) -> jax.Array:
    return _masked(values, mask)


@_through.defjvp
def _through_jvp(primals: PyTree, tangents: PyTree) -> tuple[jax.Array, jax.Array]:
    return _through(*primals), tangents[0]
