"""Scores of classes, ``[*examples, classes]``, and what they answer."""

import jax
import jax.numpy as jnp

from jaxopt_compress.evaluation.sums import spread
from jaxopt_compress.typing import PyTree


def answers(scores: jax.Array) -> jax.Array:
    """The class of the highest score, ``[*examples]``; -1 where a score is NaN."""
    return jnp.where(has_nan(scores), -1, jnp.argmax(scores, axis=-1))


def are_scores(outputs: PyTree, targets: PyTree) -> bool:
    """Whether outputs have an axis of classes more than their integer targets."""
    arrays = all(hasattr(x, "shape") and hasattr(x, "dtype") for x in (outputs, targets))
    if not arrays or not jnp.issubdtype(targets.dtype, jnp.integer):
        return False
    return tuple(outputs.shape[:-1]) == tuple(targets.shape) and outputs.ndim == targets.ndim + 1


def has_nan(scores: jax.Array) -> jax.Array:
    """Which rows have a score that is NaN, ``[*examples]``."""
    return jnp.any(jnp.isnan(scores), axis=-1)


def check_scores(scores: PyTree, targets: PyTree) -> None:
    """Raises a ValueError unless targets are classes of the scores."""
    if not are_scores(scores, targets):
        kind = lambda x: f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else type(x).__name__
        raise ValueError(
            "this metric takes scores [*examples, classes] and integer targets [*examples], not "
            f"outputs {kind(scores)} and targets {kind(targets)}"
        )


def right(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """Which examples are answered right, ``[*examples]``."""
    check_scores(scores, targets)
    # An answer that is none, -1, is right for no target, -1 included.
    return (answers(scores) == targets) & (targets >= 0)


def negative_log_likelihood(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """``-log softmax(scores)[target]``, ``[*examples]``, float32.

    NaN where the target is not a class: marks such as -1 or -100 are left out by weights of 0.
    """
    check_scores(scores, targets)
    scores = scores.astype(jnp.float32)
    own = jnp.take_along_axis(scores, targets[..., None], axis=-1, mode="clip")[..., 0]
    known = (targets >= 0) & (targets < scores.shape[-1])
    return jnp.where(known, jax.nn.logsumexp(scores, axis=-1) - own, jnp.nan)


def class_counts(
    scores: jax.Array, targets: jax.Array, weights: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """By class: right answers, answers and targets, each ``[classes]``."""
    check_scores(scores, targets)
    found, classes = answers(scores).ravel(), scores.shape[-1]
    one = jnp.ones(targets.shape, jnp.int32) if weights is None else jnp.asarray(weights)
    # In their own type, masks of bool, uint8 or bfloat16 would count no further than it goes.
    one = one.astype(jnp.float32 if jnp.issubdtype(one.dtype, jnp.floating) else jnp.int32)
    one = spread(one, targets.shape).ravel()
    targets = targets.ravel()
    targets = jnp.where((targets >= 0) & (targets < classes), targets, classes)
    # The last bin is for answers and targets that are not a class.
    count = lambda ids, w: jnp.zeros(classes + 1, one.dtype).at[ids].add(w)[:classes]
    return (
        count(targets, jnp.where(found == targets, one, 0)),
        count(found, one),
        count(targets, one),
    )
