"""What a score is."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.compression import Parameter
from jaxopt_compress.typing import PyTree


class Score(NamedTuple):
    """A score of the entries of a parameter.

    Attributes:
        score: ``score(parameter, kept) -> scores`` of the parameter's shape, at least 0 unless
            ``signed``. It is called in ``init`` and at each update that renews the mask; statistics
            are there in ``init`` only, and the gradient in updates only.
        keep: ``keep(parameter) -> kept``: arrays that the score needs later, such as input norms
            from statistics. They become part of the optimizer's state, so keep little.
        advance: ``advance(parameter, kept) -> kept``, called at each update, for scores that
            accumulate gradients; or None.
        scope: What entries are compared with, unless `prune` says it: ``"leaf"``, ``"output"`` or
            ``"global"``.
        signed: Whether scores may be negative. Two that differ in the last bit alone may then count
            as equal.
        begins: The first step with a score; accumulated ones have none at step 0.
    """

    score: Callable[[Parameter, PyTree], jax.Array]
    keep: Callable[[Parameter], PyTree] = lambda parameter: None
    advance: Callable[[Parameter, PyTree], PyTree] | None = None
    scope: str = "leaf"
    signed: bool = False
    begins: int = 0


def as_score(score: Score | Callable[[Parameter], jax.Array]) -> Score:
    """A score, or a function of the parameter alone, as a score.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(score, Score):
        return score
    module = getattr(score, "__module__", "") or ""
    if not callable(score) or module.startswith("jaxopt_compress.sparsity."):
        raise TypeError(
            f"score={getattr(score, '__name__', score)!r} is no score; "
            "jaxopt_compress.scores.magnitude() is one, and so is a function "
            "(parameter) -> scores"
        )
    return Score(lambda parameter, kept: score(parameter))


def gradient_of(parameter: Parameter) -> jax.Array:
    """The gradient at the view.

    Raises:
        ValueError: The update was given none.
    """
    if parameter.grad is None:
        raise ValueError(
            f"there is no gradient of {parameter.describe()}, which decides here: call "
            "update(state, params, grads=grads), as compressed_training does"
        )
    return parameter.grad


def statistic(parameter: Parameter, measure: str, name: str) -> jax.Array:
    """A statistic of what the parameter meets, such as ``second_moment`` of ``moments``.

    Raises:
        ValueError: Activations were infinite or NaN: their scores would be compared as if they were
            not.
    """
    parameter.stats.check_finite(parameter.describe(), measure)
    return getattr(parameter.stats, name)


def accumulated(parameter: Parameter, kept: jax.Array) -> jax.Array:
    """What is kept, as the score."""
    del parameter
    return kept


def wide(x: jax.Array) -> jax.Array:
    """In float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
