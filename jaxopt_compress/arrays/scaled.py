"""A compressed array whose inputs have scales of their own."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxopt_compress.arrays.base import CompressedArray, describe
from jaxopt_compress.arrays.fields import narrow_spec, pad_spec
from jaxopt_compress.arrays.leaf_types import compressed_array
from jaxopt_compress.numerics.rounding import seal
from jaxopt_compress.typing import Leaf


@compressed_array(data=["array", "factors"])
class ScaledArray(CompressedArray):
    """``array * factors``, of which products multiply the activation by the factors instead.

    Weights of inputs that matter more are stored larger, and rounded by steps that are small beside
    them; their factors are then below 1.

    Attributes:
        array: A compressed array.
        factors: Float32, of the rank of the array; of size 1 along its output axes, and along
            others of size 1 or whole. For a convolution with groups, one per group along the output
            axis.
    """

    array: Leaf
    factors: Leaf

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array.

        Raises:
            ValueError: The factors do not fit it.
        """
        shape, own = tuple(self.array.shape), tuple(self.factors.shape)
        # Kernels of convolutions may have one factor per group of outputs.
        parts = lambda n, m: n in (1, m) or (len(shape) > 2 and n > 0 and m % n == 0)
        if len(own) != len(shape) or not all(map(parts, own, shape)):
            raise ValueError(
                f"a ScaledArray of an array of shape {shape} has factors of shape {own}: only "
                "leading axes can be mapped over or scanned (in_axes=0)"
            )
        return shape

    @property
    def dtype(self) -> np.dtype:  # pyright: ignore
        """The dtype of the array."""
        return jnp.dtype(self.array.dtype)

    @property
    def lost_when_dense(self) -> str:  # pyright: ignore
        """What the array would lose."""
        return self.array.lost_when_dense

    def check(self) -> None:
        """As in every compressed array."""
        self.array.check()
        if self.factors.dtype != np.float32:
            raise ValueError(f"factors in {self.factors.dtype}; they are float32")
        _ = self.shape

    def describe(self) -> str:
        """What the array is."""
        return f"{describe(self.array)} scaled"

    def materialize(self) -> jax.Array:
        """The dense array times the factors, rounded once more."""
        dense = self.array.materialize()
        return seal(dense.astype(jnp.float32) * self.per_entry(), dense.dtype)

    def per_entry(self) -> jax.Array:
        """The factors in a shape that broadcasts against the array's."""
        factors = self.factors
        for axis, (n, m) in enumerate(zip(factors.shape, self.shape, strict=True)):
            factors = jnp.repeat(factors, m // n, axis) if 1 < n < m else factors
        return factors

    def specs(self, spec: PartitionSpec) -> "ScaledArray":
        """Those of the array; factors are split where they are as long."""
        entries = pad_spec(spec, self.ndim)
        factors = narrow_spec(entries, tuple(self.factors.shape))
        return self.replace(array=self.array.specs(spec), factors=factors)
