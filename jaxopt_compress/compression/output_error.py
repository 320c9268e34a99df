"""How far the outputs of a compressed parameter's products are from those of the parameter."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.compression.matrices import matrices_of
from jaxopt_compress.lift import Statistics
from jaxopt_compress.numerics.output_error import output_energy
from jaxopt_compress.tree import Layout


class OutputError(NamedTuple):
    """Relative errors of the outputs of a parameter's products.

    Attributes:
        whole: ``sqrt(tr(D^T H D) / tr(W^T H W))`` over the whole parameter.
        each: The same of each entry of its stack, such as layers or experts, as far as statistics
            tell their inputs apart; a scalar if they do not.
    """

    whole: jax.Array
    each: jax.Array


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
    matrices = matrices_of(tuple(w.shape), _layout(w.ndim, stats), stats)
    # In float32 before the difference: that of short types would be rounded once more.
    wide = [x.astype(jnp.float32) for x in (w, approximation)]
    energy = lambda x: output_energy(matrices.of(x), moment)
    norm, error = energy(wide[0]), energy(wide[1] - wide[0])
    return OutputError(_root(jnp.sum(error), jnp.sum(norm)), _root(error, norm))


def _layout(ndim: int, stats: Statistics | None) -> Layout:
    """One matrix of all entries; without statistics, one column."""
    contracting = tuple(range(-ndim, 0)) if stats is None else stats.contracting
    return Layout(contracting, tuple(d for d in range(-ndim, 0) if d not in contracting))


def _root(error: jax.Array, norm: jax.Array) -> jax.Array:
    # An error of outputs that are all 0 has no size to compare with.
    return jnp.sqrt(error / jnp.where(norm > 0, norm, jnp.where(error > 0, 0, 1)))
