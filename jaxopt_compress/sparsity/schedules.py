"""Sparsity over training steps: how much is pruned, and when masks are computed anew."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike


class Schedule(NamedTuple):
    """Two functions of an int32 step, both jit-able.

    Attributes:
        sparsity: Maps the step to the fraction of entries pruned, float32.
        due: Maps the step to whether the mask is computed anew at it, bool.
    """

    sparsity: Callable[[ArrayLike], jax.Array]
    due: Callable[[ArrayLike], jax.Array]


def _check_sparsity(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(
            f"{name}={value} is not a sparsity; it is the fraction pruned, "
            "at least 0 and below 1, for example 0.9"
        )


def constant(sparsity: float) -> Schedule:
    """The same sparsity at every step; the mask is computed once, at step 0.

    Args:
        sparsity: Fraction of entries pruned, in ``[0, 1)``.

    Returns:
        The schedule.

    Raises:
        ValueError: The sparsity is out of range.

    Example:
        >>> import jaxopt_compress as jc
        >>> schedule = jc.schedules.constant(0.5)
        >>> float(schedule.sparsity(7)), bool(schedule.due(0)), bool(schedule.due(7))
        (0.5, True, False)
    """
    _check_sparsity("sparsity", sparsity)

    def sparsity_fn(step):
        return jnp.full(jnp.shape(step), sparsity, jnp.float32)

    def due(step):
        return jnp.asarray(step) == 0

    return Schedule(sparsity_fn, due)


def polynomial(
    final: float,
    begin: int,
    end: int,
    initial: float = 0.0,
    power: float = 3,
    every: int = 1,
) -> Schedule:
    """Sparsity that rises fast at first and slowly at last.

    ``s(t) = final + (initial - final) * (1 - p)**power``, where
    ``p = (t - begin) / (end - begin)`` clipped to ``[0, 1]``.

    Args:
        final: Sparsity from step ``end`` on, in ``[0, 1)``.
        begin: First step at which the mask is computed.
        end: Last one.
        initial: Sparsity up to step ``begin``, in ``[0, 1)``.
        power: Exponent; 1 is linear.
        every: Steps between two computations of the mask, counted from ``begin``. Step ``end`` is
            always one, so that ``final`` is reached.

    Returns:
        The schedule.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> import jaxopt_compress as jc
        >>> schedule = jc.schedules.polynomial(0.8, begin=100, end=110, initial=0.2, every=4)
        >>> [round(float(schedule.sparsity(step)), 4) for step in (0, 100, 102, 105, 110, 200)]
        [0.2, 0.2, 0.4928, 0.725, 0.8, 0.8]
        >>> [step for step in range(90, 120) if schedule.due(step)]
        [100, 104, 108, 110]

    References:
        Zhu and Gupta (2017), To prune, or not to prune: exploring the efficacy of pruning for
        model compression.
    """
    _check_sparsity("final", final)
    _check_sparsity("initial", initial)
    if begin < 0:
        raise ValueError(f"begin={begin}; the first step is 0")
    if end <= begin:
        raise ValueError(f"end={end} is not after begin={begin}; at least {begin + 1} works")
    if not 0 < power < math.inf:
        raise ValueError(f"power={power}; it must be positive and finite, 3 is usual")
    if every < 1:
        raise ValueError(f"every={every}; it counts steps, 1 computes the mask at each")

    def sparsity_fn(step):
        # Clipped as integers: differences of far steps are not exact in float32.
        remaining = end - jnp.clip(jnp.asarray(step), begin, end)
        weight = (remaining.astype(jnp.float32) / (end - begin)) ** power
        between = jnp.float32(final) + jnp.float32(initial - final) * weight
        # The rounded formula ends on `final` exactly, and starts near `initial`.
        return jnp.where(remaining < end - begin, between, jnp.float32(initial))

    def due(step):
        step = jnp.asarray(step)
        on_grid = (step - begin) % every == 0
        return (begin <= step) & (step <= end) & (on_grid | (step == end))

    return Schedule(sparsity_fn, due)


def keep_count(size: int, sparsity: ArrayLike) -> jax.Array:
    """Number of entries kept: ``size - round(size * sparsity)``, halves rounded up.

    The product is computed in integers and is exact for the sparsity as a float32; a float32
    product would be off by up to about a hundred entries at sizes near ``2**31``.

    Args:
        size: Number of entries, below ``2**31``.
        sparsity: Fraction pruned, float32 of any shape; clipped to ``[0, 1]``.

    Returns:
        Int32 of the sparsity's shape.

    Raises:
        ValueError: The size is out of range.

    Example:
        >>> keep_count(10, 0.25).item(), keep_count(2**31 - 1, 2.0**-24).item()
        (7, 2147483519)
    """
    if not 0 <= size < 2**31:
        raise ValueError(f"size={size}; sizes from 0 to {2**31 - 1} can be counted in int32")
    sparsity = jnp.clip(jnp.asarray(sparsity, jnp.float32), 0, 1)
    bits = lax.bitcast_convert_type(sparsity, jnp.uint32)
    exponent = bits >> 23
    # Below 1, sparsity == mantissa / 2**(24 + shift) with shift >= 0.
    mantissa = (bits & 0x7FFFFF) | jnp.where(exponent > 0, jnp.uint32(1 << 23), jnp.uint32(0))
    shift = 126 - jnp.clip(exponent, 1, 126)

    # size * mantissa in digits of 12 bits, for there are no 64-bit integers by default.
    low, high = mantissa & 0xFFF, mantissa >> 12
    s0, s1, s2 = (jnp.uint32(size >> k & 0xFFF) for k in (0, 12, 24))
    d0 = s0 * low
    d1 = s0 * high + s1 * low + (d0 >> 12)
    d2 = s1 * high + s2 * low + (d1 >> 12)
    d3 = s2 * high + (d2 >> 12)
    product = (d3 << 13) | ((d2 & 0xFFF) << 1) | ((d1 & 0xFFF) >> 11)  # the upper 32 of 55 bits
    doubled = jnp.where(shift < 32, product >> jnp.minimum(shift, 31), jnp.uint32(0))
    pruned = jnp.where(sparsity < 1, ((doubled + 1) >> 1).astype(jnp.int32), size)
    return size - pruned


__all__ = ["Schedule", "constant", "polynomial"]
