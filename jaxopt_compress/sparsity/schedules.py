"""Sparsity over training steps: how much is pruned, and when masks are computed anew."""

import math

import jax.numpy as jnp

from jaxopt_compress.sparsity.schedule import (
    Schedule,
    between,
    check_every,
    check_span,
    check_sparsity,
    from_optax,
)

_MAX = 2**31 - 1


def constant(sparsity: float, every: int | None = None, end: int | None = None) -> Schedule:
    """The same sparsity at every step.

    Args:
        sparsity: Fraction of entries pruned, in ``[0, 1)``.
        every: Steps between two computations of the mask, counted from 0; None computes it once, at
            step 0.
        end: The last step at which it may be computed; None for no end.

    Returns:
        The schedule.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> import jaxopt_compress as jc
        >>> schedule = jc.schedules.constant(0.5)
        >>> float(schedule.sparsity(7)), bool(schedule.due(0)), bool(schedule.due(7))
        (0.5, True, False)
        >>> schedule = jc.schedules.constant(0.5, every=100, end=250)
        >>> [step for step in range(500) if schedule.due(step)]
        [0, 100, 200]
    """
    check_sparsity("sparsity", sparsity)
    if every is None and end is not None:
        raise ValueError(f"end={end} of a mask that is computed once: say every= too")
    check_every(1 if every is None else every)

    def sparsity_fn(step):
        return jnp.full(jnp.shape(step), sparsity, jnp.float32)

    def due(step):
        step = jnp.asarray(step)
        if every is None:
            return step == 0
        return (step % every == 0) & (True if end is None else step <= end)

    return Schedule(sparsity_fn, due)


def one_shot(sparsity: float, step: int) -> Schedule:
    """No sparsity before a step, and all of it from there on; the mask is computed once, at it.

    Args:
        sparsity: Fraction of entries pruned from then on, in ``[0, 1)``.
        step: The step, at least 0.

    Returns:
        The schedule.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> import jaxopt_compress as jc
        >>> schedule = jc.schedules.one_shot(0.5, 3)
        >>> [float(schedule.sparsity(step)) for step in range(5)]
        [0.0, 0.0, 0.0, 0.5, 0.5]
    """
    check_sparsity("sparsity", sparsity)
    if step < 0:
        raise ValueError(f"step={step}; the first step is 0")

    def sparsity_fn(now):
        return jnp.where(jnp.asarray(now) >= step, jnp.float32(sparsity), jnp.float32(0))

    return Schedule(sparsity_fn, lambda now: jnp.asarray(now) == step)


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
    check_sparsity("final", final)
    check_sparsity("initial", initial)
    check_span(begin, end)
    if not 0 < power < math.inf:
        raise ValueError(f"power={power}; it must be positive and finite, 3 is usual")
    check_every(every)

    def sparsity_fn(step):
        # Clipped as integers: differences of far steps are not exact in float32.
        remaining = end - jnp.clip(jnp.asarray(step), begin, end)
        weight = (remaining.astype(jnp.float32) / (end - begin)) ** power
        between = jnp.float32(final) + jnp.float32(initial - final) * weight
        # The rounded formula ends on `final` exactly, and starts near `initial`.
        return jnp.where(remaining < end - begin, between, jnp.float32(initial))

    return Schedule(sparsity_fn, between(begin, end, every))


def exponential(
    final: float, begin: int, end: int, initial: float = 0.0, every: int = 1
) -> Schedule:
    """Sparsity that prunes the same share of the remaining entries each time.

    ``1 - s(t) = (1 - initial)**(1 - p) * (1 - final)**p``, where
    ``p = (t - begin) / (end - begin)`` clipped to ``[0, 1]``. The search for lottery tickets goes
    this way: one that keeps 80% in each of ``n`` rounds ends at ``final = 1 - 0.8**n``.

    Args:
        final: Sparsity from step ``end`` on, in ``[0, 1)``.
        begin: First step at which the mask is computed.
        end: Last one.
        initial: Sparsity up to step ``begin``, in ``[0, 1)``.
        every: As in `polynomial`.

    Returns:
        The schedule.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> import jaxopt_compress as jc
        >>> schedule = jc.schedules.exponential(0.75, begin=0, end=2)
        >>> [float(schedule.sparsity(step)) for step in range(4)]
        [0.0, 0.5, 0.75, 0.75]
    """
    check_sparsity("final", final)
    check_sparsity("initial", initial)
    check_span(begin, end)
    check_every(every)
    low, high = math.log1p(-initial), math.log1p(-final)

    def sparsity_fn(step):
        passed = jnp.clip(jnp.asarray(step), begin, end) - begin
        share = passed.astype(jnp.float32) / (end - begin)
        between = -jnp.expm1(low + (high - low) * share)
        between = jnp.where(passed < end - begin, between, jnp.float32(final))
        return jnp.where(passed > 0, between, jnp.float32(initial))

    return Schedule(sparsity_fn, between(begin, end, every))


def cyclic(sparsity: float, dense: int, sparse: int, begin: int = 0, end: int = _MAX) -> Schedule:
    """Dense and sparse phases in turn, as in AC/DC.

    Dense up to step ``begin``; then sparse for ``sparse`` steps, dense for ``dense`` steps, and so
    on; sparse from step ``end`` on. The mask is computed where a phase begins. The paper begins
    dense phases with zeros: ``prune(pruned="zero")``.

    Args:
        sparsity: Fraction of entries pruned in sparse phases, in ``[0, 1)``.
        dense: Steps of a dense phase.
        sparse: Steps of a sparse phase.
        begin: First step of the first sparse phase.
        end: First step of the last one.

    Returns:
        The schedule.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> import jaxopt_compress as jc
        >>> schedule = jc.schedules.cyclic(0.5, dense=2, sparse=3, begin=1, end=9)
        >>> "".join("sd"[float(schedule.sparsity(step)) == 0] for step in range(12))
        'dsssddssssss'

    References:
        Peste et al., 2021, AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
        Networks.
    """
    check_sparsity("sparsity", sparsity)
    check_span(begin, end)
    if min(dense, sparse) < 1:
        raise ValueError(f"dense={dense} and sparse={sparse}; each phase has at least one step")

    def is_sparse(step):
        inside = (jnp.asarray(step) - begin) % (dense + sparse) < sparse
        return ((step >= begin) & inside) | (step >= end)

    def sparsity_fn(step):
        return jnp.where(is_sparse(jnp.asarray(step)), jnp.float32(sparsity), jnp.float32(0))

    def due(step):
        step = jnp.asarray(step)
        return (step == 0) | (is_sparse(step) != is_sparse(step - 1))

    return Schedule(sparsity_fn, due)


__all__ = ["Schedule", "constant", "cyclic", "exponential", "from_optax", "one_shot", "polynomial"]
