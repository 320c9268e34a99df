"""A weight in training: dense values, and their grid."""

import jax
import numpy as np
from jax import lax

from jaxopt_compress.arrays.base import CompressedArray
from jaxopt_compress.arrays.leaf_types import compressed_array
from jaxopt_compress.arrays.quantized import QuantizedArray
from jaxopt_compress.numerics.codes import encode, round_to_grid
from jaxopt_compress.numerics.steps import zero_dtype


@compressed_array(data=["form"], stored=False)
class FakeQuantizedArray(CompressedArray):
    """Values that are rounded to a grid, and that gradients are taken at; all arrays are floats.

    It is rounded where it is used, which for values on the grid changes nothing.

    Attributes:
        form: A `QuantizedArray` with the values in the place of codes, and float32 zero points.
    """

    form: QuantizedArray

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.form.shape

    @property
    def dtype(self) -> np.dtype:  # pyright: ignore
        """What the rounded values are cast to."""
        return self.form.dtype

    def describe(self) -> str:
        """The grid."""
        return f"fake {self.form.describe()}"

    def materialize(self) -> jax.Array:
        """The values on the grid; the derivative is the identity."""
        return self.moving(self.quantized().materialize())

    def moving(self, rounded: jax.Array) -> jax.Array:
        """What they were rounded to, with the identity as its derivative."""
        return _in_place_of(self.form.codes, rounded)

    def quantized(self) -> QuantizedArray:
        """The nearest codes, computed once. Its derivatives are zero."""
        form = self.nearest()
        # The backward pass is to read these, not the values once more.
        return form.replace(codes=lax.optimization_barrier(form.codes))

    def nearest(self) -> QuantizedArray:
        """As `quantized`, for a single use, which compilers may fuse with the rounding."""
        form = jax.tree.map(lax.stop_gradient, self.form)
        fmt, steps = form.fmt, form.per_entry(form.steps())
        zero = None if form.zero is None else form.zero.astype(zero_dtype(fmt))
        wide = None if zero is None else form.per_entry(zero)
        levels, _ = round_to_grid(form.codes, steps, wide, fmt)
        return form.replace(codes=encode(levels, fmt), zero=zero)


@jax.custom_jvp
def _in_place_of(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """``rounded``, perhaps of a shorter dtype, with the derivatives of ``x``."""
    del x
    return rounded


@_in_place_of.defjvp
def _in_place_of_jvp(primals, tangents):
    return _in_place_of(*primals), tangents[0].astype(primals[1].dtype)
