"""A function of each entry of a compressed array, on its way to a sum.

The norm of a weight reads each of its entries once: XLA fuses the decoding with the sum, and no
dense weight is written.
"""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxopt_compress.arrays import CompressedArray
from jaxopt_compress.lift import _compat
from jaxopt_compress.lift.interpreter import JaxprEqn
from jaxopt_compress.typing import Value


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["eqn"])
@dataclasses.dataclass(frozen=True)
class Mapped(CompressedArray):
    """The result of an elementwise operation on a compressed array.

    Attributes:
        array: A compressed array.
        eqn: The operation, all of whose operands it is.
    """

    array: Value
    eqn: JaxprEqn

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:  # pyright: ignore
        """The dtype of the result."""
        return _compat.type_of(self.eqn.outvars[0]).dtype

    def materialize(self) -> jax.Array:
        """The operation on the dense array."""
        dense = self.array.materialize()
        return _compat.bind(self.eqn, [dense] * len(self.eqn.invars))[0]

    def specs(self, spec: PartitionSpec) -> "Mapped":
        """The specs of the array."""
        return self.replace(array=self.array.specs(spec))
