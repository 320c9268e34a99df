"""How far the outputs of a compressed parameter's products are from those of the parameter."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.compression.method import Parameter
from jaxopt_compress.lift import Statistics
from jaxopt_compress.numerics.output_error import output_energy
from jaxopt_compress.tree import Layout


class OutputError(NamedTuple):
    """Relative errors of the outputs of a parameter's products.

    Attributes:
        whole: ``sqrt(tr(D^T H D) / tr(W^T H W))`` over the whole parameter.
        worst: The largest of these over the entries of its stack, such as layers or experts.
    """

    whole: jax.Array
    worst: jax.Array


def output_error(w: jax.Array, approximation: jax.Array, stats: Statistics | None) -> OutputError:
    r"""The relative error of products with an approximation, on inputs of known statistics.

    .. math:: \sqrt{\mathrm{tr}(D^T H D) / \mathrm{tr}(W^T H W)}, \qquad
        D = \hat W - W, \quad H = E[x x^T]

    Args:
        w: The parameter.
        approximation: Another array of its shape.
        stats: `Statistics` of the activations that meet it, with second moments; or None, for the
            relative error of the entries themselves.

    Returns:
        The `OutputError`, 0 where both outputs are 0.
    """
    moment = None if stats is None else stats.second_moment
    layout, groups = _layout(tuple(w.shape), stats)
    as_matrix = Parameter("", w, layout).matrix
    # In float32 before the difference: that of short types would be rounded once more.
    wide = [x.astype(jnp.float32) for x in (w, approximation)]
    energy = lambda x: output_energy(_split(as_matrix(x), groups), moment)
    norm, error = energy(wide[0]), energy(wide[1] - wide[0])
    return OutputError(_root(jnp.sum(error), jnp.sum(norm)), jnp.max(_root(error, norm)))


def _layout(shape: tuple[int, ...], stats: Statistics | None) -> tuple[Layout, int | None]:
    """The axes of the matrices that statistics are of, and the groups of a convolution."""
    ndim = len(shape)
    if stats is None:
        return Layout(tuple(range(-ndim, 0)), ()), None
    lead, contracting = tuple(stats.rows.shape), stats.contracting
    stack = tuple(d - ndim for d in range(len(lead)))
    apart = lead == shape[: len(lead)] and not set(stack) & set(contracting)
    if not lead or not apart:
        stack = ()
    output = tuple(d for d in range(-ndim, 0) if d not in (*stack, *contracting))
    groups = lead[0] if lead and not apart else None
    columns = math.prod(shape[d] for d in output)
    if groups is not None and (len(lead) > 1 or columns % groups):
        raise ValueError(
            f"statistics of shape {lead} do not fit a parameter of shape {shape}: calibrate the "
            "same function with the same parameters"
        )
    return Layout(contracting, output, stack), groups


def _split(m: jax.Array, groups: int | None) -> jax.Array:
    """``[groups, k, n / groups]``: the columns of each group of a convolution."""
    if groups is None:
        return m
    return jnp.moveaxis(m.reshape(m.shape[0], groups, -1), 1, 0)


def _root(error: jax.Array, norm: jax.Array) -> jax.Array:
    # An error of outputs that are all 0 has no size to compare with.
    return jnp.sqrt(error / jnp.where(norm > 0, norm, jnp.where(error > 0, 0, 1)))
