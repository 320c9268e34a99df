"""One parameter that a method decides on."""

import math
from typing import Any, NamedTuple

import jax

from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.tree import Layout
from jaxopt_compress.typing import Leaf


class Parameter(NamedTuple):
    """One parameter that a method decides on.

    Attributes:
        path: Its path in the tree; a factor's path is that of the parameter and the factor's name.
        value: A floating array, or a compressed array that an earlier element of a chain made.
        layout: The roles of its axes.
        stats: `Statistics` of the activations that meet it; None without, and in updates.
        keep: Booleans of its shape, false where earlier elements fixed a zero; or None.
        grad: The gradient of the loss at its view, of its shape; None where there is none.
        flops: The operations of its products in a call of the function, from uses; None where they
            are unknown, and in updates.
    """

    path: str
    value: Leaf
    layout: Layout
    stats: Any = None
    keep: Any = None
    grad: Any = None
    flops: int | None = None

    def describe(self) -> str:
        """How errors name it."""
        return f"{self.path!r} of shape {tuple(self.value.shape)}"

    def dense(self) -> jax.Array:
        """The value as a dense array."""
        return self.value.materialize() if is_compressed(self.value) else self.value

    def matrix(self, x: Leaf = None) -> jax.Array:
        """An array of the parameter's shape as matrices ``[*stack, k, n]``.

        Args:
            x: The array; by default the dense value.

        Returns:
            ``k`` runs over the contracted axes and ``n`` over the output axes, each in the
            parameter's own order, as in the second moments of `Statistics`.

        Example:
            >>> import jax.numpy as jnp
            >>> heads = Parameter("w", jnp.zeros((5, 8, 2, 3)), Layout((-3,), (-2, -1), (-4,)))
            >>> heads.matrix().shape, heads.from_matrix(heads.matrix()).shape
            ((5, 8, 6), (5, 8, 2, 3))
        """
        x = self.dense() if x is None else x
        stack, k, n = self._axes()
        size = lambda axes: math.prod(x.shape[d] for d in axes)
        lead = [x.shape[d] for d in stack]
        return x.transpose(*stack, *k, *n).reshape(*lead, size(k), size(n))

    def from_matrix(self, m: jax.Array) -> jax.Array:
        """Inverts `matrix`."""
        stack, k, n = self._axes()
        order = (*stack, *k, *n)
        inverse = sorted(range(len(order)), key=lambda i: order[i])
        return m.reshape([self.value.shape[d] for d in order]).transpose(inverse)

    def _axes(self) -> tuple[list[int], list[int], list[int]]:
        """Stack, contracted and output axes, as negative numbers in order."""
        stack, k = sorted(self.layout.stack), sorted(self.layout.contracting)
        return stack, k, [d for d in range(-len(self.value.shape), 0) if d not in (*stack, *k)]
