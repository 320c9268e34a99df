"""Measures for `calibrate`: of the activations that meet a parameter, or of its gradient.

Measures sum over rows, batches, steps of loops and devices. One of your own is a `Measure`:

    >>> import jax.numpy as jnp, jaxopt_compress as jc
    >>> def fourth_powers(x, inside):
    ...     x = x if inside is None else jnp.where(inside[..., None], x, 0)
    ...     return jc.measures.Reducible(sums={"total": (x**4).sum(-2)})
    >>> def per_row(values, rows):
    ...     return values["total"] / jnp.maximum(rows, 1)[..., None]
    >>> fourth = jc.measures.Measure("fourth", observe=fourth_powers, result=per_row)
    >>> model = lambda params, x: x @ params["w"]
    >>> params, x = {"w": jnp.ones((2, 3))}, jnp.array([[1.0, 2.0], [1.0, 0.0]])
    >>> stats = jc.calibrate(model, params, [x], measures=(fourth,))
    >>> stats["w"][0].value("fourth")
    Array([1., 8.], dtype=float32)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.lift.observe.statistics import Result
from jaxopt_compress.lift.observe.tape import Reducible

__all__ = ["Measure", "Reducible", "fisher", "means", "moments", "ranges", "zeros"]


class Measure(NamedTuple):
    """Something to measure, of activations or of gradients; one of the two functions is given.

    Attributes:
        name: What `Statistics.value` and `Statistics.has` call it.
        observe: ``observe(x, inside) -> Reducible``, of activations ``x`` ``[*lead, rows, k]``,
            float32, and booleans ``inside`` ``[*lead, rows]``, which rows count, or None for all.
            Sums and extremes have the leading axes ``[*lead]``.
        of_gradient: ``of_gradient(g) -> Reducible``, of the gradient of one batch, of the
            parameter's shape. Sums and extremes have the rank of ``g``.
        result: ``result(values, rows)``: the finished value, from all sums and extremes by name and
            the number of rows ``[*stack]``. None leaves them as they are. It is a static part of
            the statistics: take a function of a module, not one made anew for each call.
    """

    name: str
    observe: Callable[[jax.Array, jax.Array | None], Reducible] | None = None
    of_gradient: Callable[[jax.Array], Reducible] | None = None
    result: Result | None = None


def moments() -> Measure:
    """Second moments ``E[x x^T]``, for `Statistics.second_moment`.

    They take ``k * k`` floats per parameter: the Hessian of a layer's squared error, up to a factor
    of 2.

    Returns:
        The measure ``"moments"``.
    """
    return Measure("moments", observe=_outer, result=_mean_outer)


def ranges() -> Measure:
    """The smallest and largest entries, for `Statistics.low`, `high` and `absmax`.

    Returns:
        The measure ``"ranges"``.
    """
    return Measure("ranges", observe=_extremes, result=_range)


def means() -> Measure:
    """Means and mean magnitudes, for `Statistics.mean` and `mean_magnitude`.

    Returns:
        The measure ``"means"``.
    """
    return Measure("means", observe=_totals, result=_means)


def zeros() -> Measure:
    """The fraction of zeros in activations, for `Statistics.zero_fraction`.

    Returns:
        The measure ``"zeros"``.

    References:
        Hu et al., 2016, Network Trimming: A Data-Driven Neuron Pruning Approach.
    """
    return Measure("zeros", observe=_count_zeros, result=_fraction)


def fisher() -> Measure:
    """The diagonal of the empirical Fisher information, for `Statistics.fisher`.

    It is the mean over batches of the squared gradient of the function, which has to return a
    scalar. With batches of one example and a negative log-likelihood it is the Fisher diagonal; of
    larger batches, the square of a mean gradient.

    Returns:
        The measure ``"fisher"``.

    References:
        Kirkpatrick et al., 2017, Overcoming Catastrophic Forgetting in Neural Networks. Theis et
        al., 2018, Faster Gaze Prediction with Dense Networks and Fisher Pruning.
    """
    return Measure("fisher", of_gradient=_squares, result=_mean_squares)


def _kept(x: jax.Array, inside: jax.Array | None, other: float = 0) -> jax.Array:
    """The rows that count, and ``other`` in the place of those that do not."""
    return x if inside is None else jnp.where(inside[..., None], x, other)


def _per_row(total: jax.Array, rows: jax.Array) -> jax.Array:
    """A sum over its rows; 0 if there were none."""
    rows = jnp.maximum(jnp.asarray(rows), 1)
    return total / rows.reshape(*rows.shape, *[1] * (total.ndim - rows.ndim)).astype(total.dtype)


def _outer(x: jax.Array, inside: jax.Array | None) -> Reducible:
    x = _kept(x, inside)
    outer = jnp.einsum("...ri,...rj->...ij", x, x, precision=lax.Precision.HIGHEST)
    return Reducible(sums={"outer": outer})


def _mean_outer(values: dict[str, jax.Array], rows: jax.Array) -> jax.Array:
    return _per_row(values["outer"], rows)


def _extremes(x: jax.Array, inside: jax.Array | None) -> Reducible:
    low = _kept(x, inside, jnp.inf).min(-2, initial=jnp.inf)
    high = _kept(x, inside, -jnp.inf).max(-2, initial=-jnp.inf)
    return Reducible(lows={"low": low}, highs={"high": high})


def _range(values: dict[str, jax.Array], rows: jax.Array) -> dict[str, jax.Array]:
    seen = jnp.asarray(rows)[..., None] > 0
    return {name: jnp.where(seen, x, 0) for name, x in values.items()}


def _totals(x: jax.Array, inside: jax.Array | None) -> Reducible:
    x = _kept(x, inside)
    return Reducible(sums={"mean": x.sum(-2), "mean_magnitude": jnp.abs(x).sum(-2)})


def _means(values: dict[str, jax.Array], rows: jax.Array) -> dict[str, jax.Array]:
    return {name: _per_row(x, rows) for name, x in values.items()}


def _count_zeros(x: jax.Array, inside: jax.Array | None) -> Reducible:
    # Counts are exact, which those of float32 are up to 2**24 only.
    return Reducible(sums={"count": (_kept(x, inside, 1) == 0).sum(-2, dtype=jnp.int32)})


def _fraction(values: dict[str, jax.Array], rows: jax.Array) -> jax.Array:
    return _per_row(values["count"].astype(jnp.float32), rows)


def _squares(g: jax.Array) -> Reducible:
    # One number of batches per slice of the parameter, so that statistics can be sliced.
    batches = jnp.ones((*g.shape[:-1], 1), jnp.int32)
    return Reducible(sums={"squares": jnp.square(g.astype(jnp.float32)), "batches": batches})


def _mean_squares(values: dict[str, jax.Array], rows: jax.Array) -> jax.Array:
    del rows
    return values["squares"] / values["batches"]
