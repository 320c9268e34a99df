"""Names for types that Python cannot spell, and that many signatures share.

Each is `Any` to a type checker. Where a type can be spelled, signatures spell it.
"""

from typing import Any, TypeAlias

PyTree: TypeAlias = Any
"""Parameters, states, gradients or outputs: a tree whose leaves are arrays or compressed arrays."""

Leaf: TypeAlias = Any
"""A leaf of such a tree: an array of JAX or NumPy, a shape, or a compressed array."""

Value: TypeAlias = Any
"""What a replayed function computes with: an array, a tracer, a compressed array, or a view."""
