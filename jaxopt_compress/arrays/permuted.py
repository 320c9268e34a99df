"""A compressed array whose axes come in another order than those of the dense array."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxopt_compress.arrays.base import CompressedArray, describe
from jaxopt_compress.arrays.fields import check_axis, pad_spec
from jaxopt_compress.arrays.layout import Layout
from jaxopt_compress.arrays.leaf_types import compressed_array
from jaxopt_compress.typing import Leaf


@compressed_array(data=["array"], static=["axes"])
class PermutedArray(CompressedArray):
    """An array with its trailing axes in another order.

    Factors have the axes that are summed over beside each other; in a parameter such as the
    ``[heads, d, head_dim]`` of an attention they are between others.

    Attributes:
        array: A compressed array of the rank of the dense one.
        axes: The negative axes of the dense array that the trailing axes of ``array`` are; leading
            axes, which are stack axes, stay where they are.
    """

    array: Leaf
    axes: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:  # pyright: ignore
        """The dtype of the array."""
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array, its axes in order.

        Raises:
            ValueError: The array has too few axes.
        """
        own = tuple(self.array.shape)
        if len(own) < len(self.axes):
            raise ValueError(
                f"a PermutedArray of axes {self.axes} holds an array of shape {own}: only leading "
                "axes that are stacks can be mapped over or scanned (in_axes=0)"
            )
        return tuple(own[d] for d in self.order)

    @property
    def order(self) -> tuple[int, ...]:
        """For each axis of the dense array, which axis of ``array`` it is."""
        lead = len(self.array.shape) - len(self.axes)
        trailing = range(-len(self.axes), 0)
        return (*range(lead), *(lead + self.axes.index(d) for d in trailing))

    def check(self) -> None:
        """The axes are all of the trailing ones, each once."""
        for axis in self.axes:
            check_axis(axis, len(self.axes))
        if len(set(self.axes)) != len(self.axes):
            raise ValueError(f"axes={self.axes}")
        self.array.check()
        _ = self.shape

    def describe(self) -> str:
        """What the array is."""
        return describe(self.array)

    def materialize(self) -> jax.Array:
        """The dense array, its axes in order."""
        _ = self.shape
        return jnp.transpose(self.array.materialize(), self.order)

    def specs(self, spec: PartitionSpec) -> "PermutedArray":
        """The specs of the array, whose axes are those of the dense one in another order."""
        entries = pad_spec(spec, self.ndim)
        inverse = sorted(range(self.ndim), key=self.order.__getitem__)
        return self.replace(array=self.array.specs(PartitionSpec(*(entries[d] for d in inverse))))

    def factors(self) -> dict[str, Leaf]:
        """The factors of the array."""
        return self.array.factors()

    def with_factors(self, factors: Mapping[str, Leaf]) -> "PermutedArray":
        """The same product of other factors."""
        return self.replace(array=self.array.with_factors(factors))

    def factor_layouts(self, layout: Layout) -> dict[str, Layout]:
        """As of the array; the axes of factors are in its order."""
        return self.array.factor_layouts(self._own(layout))

    def factor_inputs(self, name: str, layout: Layout) -> jax.Array | None:
        """As of the array."""
        return self.array.factor_inputs(name, self._own(layout))

    def _own(self, layout: Layout) -> Layout:
        """The roles of the axes of ``array``."""
        own = lambda axes: tuple(sorted(self.order[d] - self.ndim for d in axes))
        return Layout(own(layout.contracting), own(layout.output), own(layout.stack))
