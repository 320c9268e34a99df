"""Measures of ranges that methods share: the whole range, the mean magnitude, least squares."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.numerics.formats import Format

Range = tuple[jax.Array, jax.Array]
View = Callable[..., Any]
Measure = Callable[[jax.Array, tuple[int, ...], Format, bool, View], Range]

# How many parts of a range are tried, and the smallest of them.
CANDIDATES, LEAST = 80, 0.2


def whole(x: jax.Array, axes: tuple[int, ...], fmt: Format, symmetric: bool, view: View) -> Range:
    """The largest magnitude on both sides, or the smallest and the largest value."""
    del fmt, view
    if symmetric:
        high = jnp.max(jnp.abs(x), axes, keepdims=True)
        return -high, high
    return jnp.min(x, axes, keepdims=True), jnp.max(x, axes, keepdims=True)


def whole_on_grid(
    x: jax.Array, axes: tuple[int, ...], fmt: Format, symmetric: bool, view: View
) -> Range:
    """As `whole`; if symmetric, so wide that the largest magnitude is the largest level."""
    low, high = whole(x, axes, fmt, symmetric, view)
    if not symmetric:
        return low, high
    high = _capped(high, _reach(fmt)) * _reach(fmt)
    return -high, high


def absmean(x: jax.Array, axes: tuple[int, ...], fmt: Format, symmetric: bool, view: View) -> Range:
    """The mean magnitude, of which binary and ternary weights are multiples.

    References:
        Rastegari et al., 2016, XNOR-Net. Ma et al., 2024, The Era of 1-bit LLMs.
    """
    del fmt, symmetric, view
    count = math.prod(x.shape[d] for d in axes)
    # The sum of large magnitudes would overflow.
    high = jnp.sum(jnp.abs(x) / count, axes, keepdims=True)
    return -high, high


def least_squares(
    candidates: int = CANDIDATES,
    least: float = LEAST,
    weights: jax.Array | None = None,
    on_grid: bool = False,
) -> Measure:
    """The measure of the part of the whole range with the least squared error.

    Args:
        candidates: How many parts are tried, evenly spaced up to 1.
        least: The smallest one.
        weights: Of the shape of the values: how much each entry's squared error counts; or None.
        on_grid: Whether wider ranges are tried too, up to `whole_on_grid`.
    """

    def measure(x, axes, fmt, symmetric, view):
        low, high = whole(x, axes, fmt, symmetric, view)

        def better(best, part):
            error, chosen = best
            squares = (view(low * part, high * part) - x) ** 2
            new = jnp.sum(squares if weights is None else squares * weights, axes, keepdims=True)
            return (jnp.minimum(new, error), jnp.where(new < error, part, chosen)), None

        start = (jnp.full_like(high, jnp.inf), jnp.ones_like(high))
        # The whole range first: it stays where nothing is better.
        parts = jnp.linspace(1.0, least, candidates, dtype=high.dtype)
        if on_grid and symmetric:
            most, gap = _reach(fmt), (1 - least) / max(candidates - 1, 1)
            more = math.ceil((most - 1) / gap) if gap else 1
            wider = jnp.linspace(most, 1, more, endpoint=False, dtype=high.dtype)
            parts, high = jnp.append(parts, wider), _capped(high, most)
            low = -high
        (_, part), _ = lax.scan(better, start, parts)
        return low * part, high * part

    return measure


def has_level(fmt: Format, symmetric: bool) -> None:
    """Refuses formats without a level above 0 for `whole_on_grid`.

    Raises:
        ValueError: Names the format.
    """
    if symmetric and not fmt.grid.high > 0:
        raise ValueError(
            f"on_grid=True makes the largest magnitude a level, and {fmt.name!r} has none above 0"
        )


def _reach(fmt: Format) -> float:
    """The range over the magnitude of its largest level, on a symmetric grid."""
    return fmt.top / fmt.grid.high


def _capped(high: jax.Array, by: float) -> jax.Array:
    """Magnitudes whose products with a number are finite where they are."""
    most = float(jnp.finfo(jnp.float32).max) * (1 - 2.0**-22) / by
    return jnp.where(jnp.isinf(high), high, jnp.minimum(high, most))
