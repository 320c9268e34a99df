"""Matrices weighed by what is known of the activations that meet them, or of their gradients."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxopt_compress.compression import NeedsStats, Parameter
from jaxopt_compress.low_rank.reading import Reading
from jaxopt_compress.numerics.whitening import outputs_of, weighted_rows

Whiten = Literal[False, True, "scale", "fisher"]
WAYS = (False, True, "scale", "fisher")
_MEASURES = {True: "moments", "scale": "means", "fisher": "fisher"}


def check_whitening(whiten: Whiten, parameter: Parameter) -> None:
    """Refuses statistics that are missing, or not finite.

    Raises:
        NeedsStats: Names the parameter and what is missing.
        ValueError: They are infinite or NaN.
    """
    if whiten is False:
        return
    name, stats = _MEASURES[whiten], parameter.stats
    if stats is None or not stats.has(name) or not (stats.contracting or whiten == "fisher"):
        raise NeedsStats(
            f"low_rank(whiten={whiten!r}) needs jaxopt_compress.measures.{name}() of "
            f"{parameter.describe()}: pass stats=jaxopt_compress.calibrate(fn, params, batches, "
            "measures=...), or run compress_in_order; or leave it out by where="
        )
    stats.check_finite(parameter.describe(), name)


def weighed(
    whiten: Whiten, parameter: Parameter, reading: Reading, w: jax.Array, damping: float
) -> jax.Array:
    """The matrices ``[*stack, k, n]`` of a parameter, weighed as ``whiten`` says."""
    if whiten is False:
        return w
    stats, shape = parameter.stats, w.shape
    if whiten == "fisher":
        return weighted_rows(w, jnp.sqrt(jnp.sum(reading.matrices(stats.fisher), -1)))
    if whiten == "scale":
        scale = jnp.sqrt(_per_entry(stats.mean_magnitude, reading, shape[-2:-1]))
        return weighted_rows(w, scale)
    return outputs_of(w, _per_entry(stats.second_moment, reading, (shape[-2],) * 2), damping)


def _per_entry(x: jax.Array, reading: Reading, own: tuple[int, ...]) -> jax.Array:
    """Statistics ``[*lead, *own]`` as those of each entry of the stack.

    What is told apart by leading axes of the stack serves all entries below; the groups of a
    convolution, which share a factor, count as one by their mean.
    """
    stack, lead = reading.stack, x.shape[: x.ndim - len(own)]
    if lead != stack[: len(lead)]:
        known = stack if lead[: len(stack)] == stack else ()
        x, lead = jnp.mean(x.reshape(*known, -1, *own), len(known)), known
    x = x.reshape(*lead, *(1,) * (len(stack) - len(lead)), *own)
    return jnp.broadcast_to(x, (*stack, *own))
