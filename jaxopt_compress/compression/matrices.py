"""A parameter as the matrices that second moments of its inputs belong to."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.compression.parameter import Parameter
from jaxopt_compress.lift import Statistics
from jaxopt_compress.tree import Layout
from jaxopt_compress.typing import Leaf


class Matrices(NamedTuple):
    """How arrays of a parameter's shape are read as matrices.

    Attributes:
        parameter: One with the roles of axes that the second moments have.
        groups: The groups of a grouped convolution, each of which has a moment of its own; or None.
    """

    parameter: Parameter
    groups: int | None

    def of(self, x: jax.Array) -> jax.Array:
        """``[*lead, k, n]``, of an array of the parameter's shape."""
        m = self.parameter.matrix(x)
        if self.groups is None:
            return m
        return jnp.moveaxis(m.reshape(m.shape[0], self.groups, -1), 1, 0)

    def back(self, m: jax.Array) -> jax.Array:
        """Inverts `of`."""
        if self.groups is not None:
            m = jnp.moveaxis(m, 0, 1).reshape(m.shape[1], -1)
        return self.parameter.from_matrix(m)

    def moment(self, stats: Statistics) -> jax.Array:
        """``[*lead, k, k]``: one second moment for each matrix."""
        h = stats.second_moment
        lead = jax.eval_shape(self.of, self.parameter.value).shape[:-2]
        return jnp.broadcast_to(h, (*lead, *h.shape[-2:]))

    def per_input(self, x: jax.Array) -> jax.Array:
        """Values ``[*lead, k]`` or ``[k]`` of inputs, as an array of the parameter's shape."""
        lead = jax.eval_shape(self.of, self.parameter.value).shape
        return self.back(jnp.broadcast_to(x[..., None], lead))


def matrices_of(shape: tuple[int, ...], layout: Layout, stats: Statistics | None) -> Matrices:
    """The matrices of a parameter of a shape.

    Args:
        shape: The parameter's shape.
        layout: The roles of its axes.
        stats: `Statistics` of its inputs, which may tell entries of fewer stack axes apart, or
            the groups of a convolution; or None.

    Raises:
        ValueError: The statistics are of another parameter.
    """
    ndim = len(shape)
    value: Leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    lead = () if stats is None else tuple(stats.rows.shape)
    if stats is None or not lead:
        return Matrices(Parameter("", value, layout), None)
    contracting = stats.contracting
    # Which axes are apart: as measured, as the layout says, or the first ones.
    fits = lambda axes: (
        bool(axes)
        and min(axes) >= -ndim
        and tuple(shape[d] for d in axes) == lead
        and not set(axes) & set(contracting)
    )
    first = tuple(d - ndim for d in range(len(lead)))
    stack = next(filter(fits, (stats.stack, tuple(sorted(layout.stack)), first)), ())
    output = tuple(d for d in range(-ndim, 0) if d not in (*stack, *contracting))
    groups = None if stack else lead[0]
    columns = math.prod(shape[d] for d in output)
    if groups is not None and (len(lead) > 1 or columns % groups):
        raise ValueError(
            f"statistics of shape {lead} do not fit a parameter of shape {shape}: calibrate the "
            "same function with the same parameters"
        )
    return Matrices(Parameter("", value, Layout(contracting, output, stack)), groups)
