"""A weight in training: dense values, and the grid that they lie on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxopt_compress.arrays.base import CompressedArray
from jaxopt_compress.arrays.quantized import QuantizedArray
from jaxopt_compress.numerics.codes import encode, round_to_grid
from jaxopt_compress.numerics.steps import zero_dtype


@functools.partial(jax.tree_util.register_dataclass, data_fields=["form"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class GriddedArray(CompressedArray):
    """Quantized values that gradients are taken at; all of its arrays are floats.

    Attributes:
        form: A `QuantizedArray` with the dense values in the place of codes, and float32 zero
            points.
    """

    form: QuantizedArray

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.form.shape

    @property
    def dtype(self) -> np.dtype:  # pyright: ignore
        """The dtype of the values."""
        return jnp.dtype(self.form.codes.dtype)

    def materialize(self) -> jax.Array:
        """The values."""
        return self.form.codes

    def quantized(self) -> QuantizedArray:
        """The codes of the values: rounding brings each to the level that it was made of.

        Its derivatives are zero.
        """
        form = jax.tree.map(lax.stop_gradient, self.form)
        fmt, steps = form.fmt, form.per_entry(form.steps())
        zero = None if form.zero is None else form.zero.astype(zero_dtype(fmt))
        wide = None if zero is None else form.per_entry(zero)
        levels, _ = round_to_grid(form.codes, steps, wide, fmt)
        return form.replace(codes=encode(levels, fmt), zero=zero)

    def specs(self, spec: PartitionSpec) -> "GriddedArray":
        """Those of the quantized array."""
        return self.replace(form=self.form.specs(spec))
