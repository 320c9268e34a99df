"""Scores: how much each entry of a parameter matters. Entries with the lowest scores are pruned."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.compression import Parameter


class Score(NamedTuple):
    """A score of the entries of a parameter.

    Attributes:
        score: ``score(parameter, kept) -> scores`` of the parameter's shape, at least 0. It is
            called in ``init`` and at each update that renews the mask; statistics are there in
            ``init`` only, and the gradient in updates only.
        keep: ``keep(parameter) -> kept``: arrays that the score needs later, such as input norms
            from statistics. They become part of the optimizer's state, so keep little.
    """

    score: Callable[[Parameter, Any], jax.Array]
    keep: Callable[[Parameter], Any] = lambda parameter: None


def magnitude() -> Score:
    """Scores entries by their absolute value.

    Returns:
        The score ``|w|``.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> prune = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5))
        >>> jc.compress({"w": jnp.array([[-2.0, 1.0]])}, prune)["w"].materialize()
        Array([[-2.,  0.]], dtype=float32)

    References:
        Han et al., 2015, Learning both Weights and Connections for Efficient Neural Networks.
    """
    return _MAGNITUDE


def is_magnitude(score: Score) -> bool:
    """Whether a score ranks entries by their absolute value."""
    return score is _MAGNITUDE


def as_score(score: Score | Callable[[Parameter], jax.Array]) -> Score:
    """A score, or a function of the parameter alone, as a score.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(score, Score):
        return score
    if score is magnitude or not callable(score):
        raise TypeError(
            f"score={getattr(score, '__name__', score)!r} is no score; "
            "jaxopt_compress.scores.magnitude() is one, and so is a function "
            "(parameter) -> scores"
        )
    return Score(lambda parameter, kept: score(parameter))


_MAGNITUDE = Score(lambda parameter, kept: jnp.abs(parameter.dense()))

__all__ = ["Score", "magnitude"]
