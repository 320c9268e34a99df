"""The range of values that a grid is made to cover: all of them, or fewer for finer steps."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.numerics.formats import Format
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.ranges import (
    CANDIDATES,
    LEAST,
    Measure,
    has_level,
    least_squares,
    whole,
    whole_on_grid,
)

__all__ = ["Bounds", "absmax", "entropy", "moving_average", "mse", "percentile"]


class Bounds(NamedTuple):
    """How a range is chosen.

    Attributes:
        measure: ``measure(x, axes, fmt, symmetric, view) -> (low, high)``: float32, of size 1 along
            ``axes``, which the entries that share a range run along. ``view(low, high)`` is ``x``
            rounded to the grid for a range.
        decay: How much of the range of the update before is kept, or None.
        clips: Whether values may lie beyond it, by more than rounding.
        check: ``check(fmt, symmetric)`` raises where such a range has no meaning; or None.
    """

    measure: Measure
    decay: float | None = None
    clips: bool = True
    check: Callable[[Format, bool], None] | None = None


def absmax(on_grid: bool = False) -> Bounds:
    r"""All values: the largest magnitude, or the smallest and the largest value.

    A symmetric grid of integers covers a range by :math:`q_{max} + 1/2` steps on each side. So the
    largest magnitude lies between two levels, and moves by half a step when it is rounded, also a
    negative one mostly to the lower level, :math:`-q_{max} - 1`. Where outputs sum inputs of one
    sign, that shifts their mean.

    Args:
        on_grid: Whether the range is :math:`(q_{max} + 1/2) / q_{max}` times as wide, so that the
            largest magnitude is the level :math:`q_{max}` and stays, with steps larger by that
            factor: 1.004 in 8 bits, and 1.07 in 4. Other grids have it on a level anyway.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params, fn = {"w": jnp.array([[1.0], [0.3]])}, lambda params, x: x @ params["w"]
        >>> largest = lambda bounds: (
        ...     jc.compress(
        ...         params,
        ...         jc.quantize("int4", bounds=bounds),
        ...         uses=jc.uses(fn, params, jnp.ones(2)),
        ...     )["w"]
        ...     .materialize()
        ...     .max()
        ... )
        >>> largest(jc.bounds.absmax()).round(2), largest(jc.bounds.absmax(on_grid=True)).round(2)
        (Array(0.93, dtype=float32), Array(1., dtype=float32))
    """
    measure, check = (whole_on_grid, has_level) if on_grid else (whole, None)
    return Bounds(measure, clips=False, check=check)


def percentile(percent: float) -> Bounds:
    """Leaves out the outermost values.

    Args:
        percent: Between 50 and 100: how many of the magnitudes lie inside; of an asymmetric range,
            how many of the values lie below its upper end, and as many above its lower one.
    """
    if not 50 < percent <= 100:
        raise ValueError(f"percentile({percent}): it lies above 50 and is at most 100")

    def measure(x, axes, fmt, symmetric, view):
        del fmt, view
        part = percent / 100
        if symmetric:
            high = jnp.quantile(jnp.abs(x), part, axes, keepdims=True)
            return -high, high
        low, high = jnp.quantile(x, jnp.array([1 - part, part]), axes, keepdims=True)
        return low, high

    return Bounds(measure)


def mse(candidates: int = CANDIDATES, least: float = LEAST, on_grid: bool = False) -> Bounds:
    """The part of the whole range that leaves the smallest squared error.

    Args:
        candidates: How many parts are tried, evenly spaced up to 1.
        least: The smallest one.
        on_grid: Whether wider ranges are tried too, as evenly spaced, up to that of
            `absmax` ``(on_grid=True)``.

    References:
        Nahshan et al., 2021, Loss Aware Post-Training Quantization.
    """
    if candidates < 1 or not 0 < least <= 1:
        raise ValueError(f"mse({candidates}, {least}): at least one candidate, in (0, 1]")
    measure = least_squares(candidates, least, on_grid=on_grid)
    return Bounds(measure, check=has_level if on_grid else None)


def entropy(bins: int = 2048) -> Bounds:
    r"""The range whose quantized histogram diverges least from that of the values.

    .. math:: \min_t D_{KL}(P_t \| Q_t)

    where :math:`P_t` is the histogram of the magnitudes with those above :math:`t` counted at
    :math:`t`, and :math:`Q_t` the same after the bins below :math:`t` were merged into as many as
    the format has magnitudes, each spread evenly over the bins that were not empty. For symmetric
    integer grids.

    Args:
        bins: Bins of the histogram, of equal width up to the largest magnitude.

    References:
        Migacz, 2017, 8-bit Inference with TensorRT.
    """

    def check(fmt, symmetric):
        if not symmetric or not isinstance(fmt.grid, Integers) or not fmt.grid.signed:
            asked = f"{fmt.name!r}" + ("" if symmetric else " with symmetric=False")
            raise ValueError(f"entropy() needs a symmetric range and signed integers, not {asked}")
        if not 1 < fmt.grid.high + 1 < bins:
            raise ValueError(f"entropy({bins}) needs more bins than {fmt.name!r} has magnitudes")

    def measure(x, axes, fmt, symmetric, view):
        del view, symmetric
        levels = fmt.grid.high + 1
        rest = [d for d in range(x.ndim) if d not in axes]
        rows = jnp.transpose(jnp.abs(x), (*rest, *axes))
        shape = [1 if d in axes else n for d, n in enumerate(x.shape)]
        rows = rows.reshape(*rows.shape[: len(rest)], -1).reshape(-1, x.size // math.prod(shape))
        high = lax.map(lambda row: _least_divergence(row, levels, bins), rows).reshape(shape)
        return -high, high

    return Bounds(measure, check=check)


def moving_average(decay: float = 0.9, of: Bounds | None = None) -> Bounds:
    """The range of earlier updates and the present one, exponentially weighted.

    ``range = decay * range + (1 - decay) * new``, starting with the first.

    Args:
        decay: At least 0, below 1.
        of: What is averaged; `absmax` by default.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"moving_average(decay={decay}): it is at least 0 and below 1")
    return (of or absmax())._replace(decay=decay, clips=True)


def _least_divergence(row: jax.Array, levels: int, bins: int) -> jax.Array:
    """The threshold for one row of magnitudes."""
    top = jnp.max(row, initial=0)
    width = jnp.where(top > 0, top, 1) / bins
    index = jnp.minimum((row / width).astype(jnp.int32), bins - 1)
    count = jnp.zeros(bins).at[index].add(1.0)
    at = jnp.arange(bins)

    def divergence(kept: jax.Array) -> jax.Array:
        inside = at < kept
        p = jnp.where(inside, count, 0).at[kept - 1].add(jnp.where(inside, 0, count).sum())
        merged = jnp.where(inside, at * levels // kept, levels)
        some = jnp.where(inside, count > 0, False)
        total = jnp.zeros(levels + 1).at[merged].add(jnp.where(inside, count, 0))
        spots = jnp.zeros(levels + 1).at[merged].add(some.astype(jnp.float32))
        q = jnp.where(some, (total / jnp.maximum(spots, 1))[merged], 0)
        p, q = p / jnp.maximum(p.sum(), 1), q / jnp.maximum(q.sum(), 1)
        # An empty bin that took the values above the threshold has no counterpart.
        return jnp.where(p > 0, p * jnp.log(p / jnp.maximum(q, 1e-7)), 0).sum()

    kept = jnp.arange(levels, bins + 1, max(1, (bins - levels) // 128))
    best = kept[jnp.argmin(lax.map(divergence, kept))].astype(width.dtype)
    return jnp.where(top > 0, best * width, 0)
