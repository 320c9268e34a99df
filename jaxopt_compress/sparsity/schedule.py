"""What a schedule of sparsity is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


class Schedule(NamedTuple):
    """Two functions of an int32 step, both jit-able.

    Attributes:
        sparsity: Maps the step to the fraction of entries pruned, float32.
        due: Maps the step to whether the mask is computed anew at it, bool.
    """

    sparsity: Callable[[ArrayLike], jax.Array]
    due: Callable[[ArrayLike], jax.Array]


def from_optax(sparsity: Callable[[Any], Any], every: int = 1) -> Schedule:
    """The sparsity that a function of the step says, such as a schedule of optax.

    `prune` takes the function itself, too, with a mask that is computed at each step.

    Args:
        sparsity: The step to the fraction of entries pruned; clipped to ``[0, 1]``.
        every: Steps between two computations of the mask, counted from 0.

    Returns:
        The schedule.

    Raises:
        ValueError: ``every`` is out of range.

    Example:
        >>> import optax, jaxopt_compress as jc
        >>> schedule = jc.schedules.from_optax(optax.linear_schedule(0.0, 0.8, 100), every=10)
        >>> round(float(schedule.sparsity(50)), 3), bool(schedule.due(50)), bool(schedule.due(51))
        (0.4, True, False)
    """
    check_every(every)
    sparsity_fn = lambda step: jnp.asarray(sparsity(jnp.asarray(step)), jnp.float32)
    return Schedule(sparsity_fn, lambda step: jnp.asarray(step) % every == 0)


def as_schedule(schedule: Any) -> Schedule:
    """A schedule, or a function of the step, as a schedule.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if not callable(schedule) or _uncalled(schedule):
        raise TypeError(
            f"schedule={schedule!r} is no schedule; jaxopt_compress.schedules.constant(0.5) is one"
        )
    return from_optax(schedule)


def _uncalled(schedule: Any) -> bool:
    """Whether it is one of the functions that make schedules, not a result of theirs."""
    return (getattr(schedule, "__module__", "") or "").startswith("jaxopt_compress.sparsity.")


def check_sparsity(name: str, value: float) -> None:
    """Refuses values that are not a fraction of entries."""
    if not 0 <= value < 1:
        raise ValueError(
            f"{name}={value} is not a sparsity; it is the fraction pruned, "
            "at least 0 and below 1, for example 0.9"
        )


def between(begin: int, end: int, every: int) -> Callable[[ArrayLike], jax.Array]:
    """Whether a step is one of every so many from ``begin``, or ``end``."""

    def due(step):
        step = jnp.asarray(step)
        on_grid = (step - begin) % every == 0
        return (begin <= step) & (step <= end) & (on_grid | (step == end))

    return due


def check_span(begin: int, end: int) -> None:
    """Refuses spans of no step, and steps before the first one."""
    if begin < 0:
        raise ValueError(f"begin={begin}; the first step is 0")
    if end <= begin:
        raise ValueError(f"end={end} is not after begin={begin}; at least {begin + 1} works")


def check_every(every: int) -> None:
    """Refuses what counts no steps."""
    if every < 1:
        raise ValueError(f"every={every}; it counts steps, 1 computes the mask at each")
