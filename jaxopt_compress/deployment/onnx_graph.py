"""A graph of ONNX while it is made."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxopt_compress.typing import Leaf


def dims_of(x: Leaf) -> list[Any]:
    """The dimensions of an abstract array: numbers, and names for symbols."""
    return [int(d) if isinstance(d, (int, np.integer)) else str(d) for d in x.shape]


class Graph:
    """Nodes, constants, inputs and outputs.

    Attributes:
        nodes: In the order of execution.
        constants: Arrays with their names.
        inputs: The types of the arguments.
        outputs: Types of results.
        narrow: Names of values that have size 1 along the symbolic dimension in the place of its
            size, which operations that broadcast make up for.
    """

    def __init__(self, onnx: Any):
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.narrow: set[str] = set()
        self._count = 0

    def name(self, stem: str) -> str:
        """An unused name."""
        self._count += 1
        return f"{stem}_{self._count}"

    def value(self, name: str, x: Leaf) -> Leaf:
        """The type of a value."""
        kind = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(x.dtype))
        return self.onnx.helper.make_tensor_value_info(name, kind, dims_of(x))

    def constant(self, x: np.ndarray, name: str | None = None) -> str:
        """A constant array; floats are float32, and integers that no other type needs are int64."""
        x = np.asarray(x)
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(np.float32)
        name = self.name("constant") if name is None else name
        if x.dtype == jnp.int4:
            codes = np.pad(x.astype(np.int8).reshape(-1) & 15, (0, x.size % 2)).astype(np.uint8)
            raw = (codes[::2] | (codes[1::2] << 4)).tobytes()
            kind = self.onnx.TensorProto.INT4
            made = self.onnx.helper.make_tensor(name, kind, x.shape, raw, raw=True)
        else:
            made = self.onnx.numpy_helper.from_array(np.ascontiguousarray(x).reshape(x.shape), name)
        self.constants.append(made)
        return name

    def node(
        self, op: str, inputs: list[str], outputs: list[str] | None = None, **given: Any
    ) -> str:
        """Adds a node; the name of its first result."""
        outputs = [self.name(op.lower())] if outputs is None else outputs
        self.nodes.append(self.onnx.helper.make_node(op, inputs, outputs, **given))
        return outputs[0]

    def materialized(self, name: str) -> str:
        """A value whose dimensions are what they are in the program.

        Raises:
            NotImplementedError: It was broadcast along the symbolic dimension.
        """
        if name in self.narrow:
            raise NotImplementedError(
                "export_onnx: a value that was broadcast along a symbolic dimension meets an "
                "operation that does not broadcast; use a number for this dimension"
            )
        return name
