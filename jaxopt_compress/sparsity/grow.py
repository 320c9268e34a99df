"""Growth: which pruned entries come back in the place of kept ones that are dropped."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.compression import Parameter
from jaxopt_compress.sparsity import scores
from jaxopt_compress.sparsity.score import Score, as_score, gradient_of

Fraction = float | Callable[[Any], Any]


class Grow(NamedTuple):
    """How kept entries are exchanged at the steps at which the schedule is due.

    Attributes:
        fraction: The step to the share of kept entries that is dropped, and grown elsewhere.
        score: Which entries grow: those with the highest scores among the pruned ones.
        start: The score of the first masks; None for that of `prune`.
    """

    fraction: Callable[[Any], Any]
    score: Score
    start: Score | None = None


def by_gradient(fraction: Fraction, start: Score | None = None) -> Grow:
    """Grows the entries with the largest gradients at the present step, as RigL does.

    Args:
        fraction: The share of kept entries that is exchanged each time, in [0, 1]; or a function of
            the step, such as ``optax.cosine_decay_schedule(0.3, steps)``.
        start: The score of the first masks, such as ``scores.random(key)``; by default that of
            `prune`.

    Returns:
        A rule for ``prune(grow=)``.

    Raises:
        ValueError: The fraction is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> grow = jc.grow.by_gradient(0.5)
        >>> c = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5, every=1), grow=grow)
        >>> params = {"w": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
        >>> state = c.update(c.init(params), params, grads={"w": jnp.array([[0.0], [0], [1], [9]])})
        >>> c.apply(params, state)["w"][:, 0] != 0
        Array([ True, False, False,  True], dtype=bool)

    References:
        Evci et al., 2020, Rigging the Lottery: Making All Tickets Winners.
    """
    score = Score(lambda parameter, kept: jnp.abs(gradient_of(parameter)))
    return Grow(_fraction(fraction), score, _start(start))


def by_momentum(fraction: Fraction, decay: float = 0.9, start: Score | None = None) -> Grow:
    """Grows the entries with the largest running mean of gradients, as SNFS does.

    Unlike in the paper, each parameter keeps its number of entries; with ``scope="global"`` these
    move between parameters too.

    Args:
        fraction: As in `by_gradient`.
        decay: The decay of the running mean per step, in [0, 1).
        start: As in `by_gradient`.

    Returns:
        A rule for ``prune(grow=)``; it keeps one array per parameter in the state.

    Raises:
        ValueError: The fraction or the decay is out of range.

    References:
        Dettmers and Zettlemoyer, 2019, Sparse Networks from Scratch: Faster Training without Losing
        Performance.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay}; it is in [0, 1), 0.9 is usual")

    def advance(parameter: Parameter, kept: jax.Array) -> jax.Array:
        return decay * kept + (1 - decay) * gradient_of(parameter).astype(jnp.float32)

    score = Score(
        lambda parameter, kept: jnp.abs(kept),
        lambda parameter: jnp.zeros(parameter.value.shape, jnp.float32),
        advance,
    )
    return Grow(_fraction(fraction), score, _start(start))


def random(key: jax.Array, fraction: Fraction, start: Score | None = None) -> Grow:
    """Grows entries by chance, other ones each time, as SET does.

    Args:
        key: A random key.
        fraction: As in `by_gradient`.
        start: As in `by_gradient`.

    Returns:
        A rule for ``prune(grow=)``.

    Raises:
        ValueError: The fraction is out of range.

    References:
        Mocanu et al., 2018, Scalable Training of Artificial Neural Networks with Adaptive Sparse
        Connectivity inspired by Network Science.
    """
    return Grow(_fraction(fraction), scores.random(key, renew=True), _start(start))


def _fraction(fraction: Fraction) -> Callable[[Any], Any]:
    if callable(fraction):
        return fraction
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction}; it is the share of kept entries, 0.3 is usual")
    return lambda count: jnp.float32(fraction)


def _start(start: Score | None) -> Score | None:
    return None if start is None else as_score(start)


__all__ = ["Grow", "by_gradient", "by_momentum", "random"]
