"""Scores of units, from scores of the entries of parameters."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxopt_compress.compression import Parameter
from jaxopt_compress.compression.leaf_states import as_jax
from jaxopt_compress.compression.selection import chosen_parameters
from jaxopt_compress.sparsity.scores import Score, as_score, is_magnitude
from jaxopt_compress.tree import assume_layout, named_leaves

Reduce = Literal["l2", "sum", "mean", "max"]


def entry_scores(
    score: Score | Callable[[Parameter], Any],
    params: Any,
    paths: frozenset[str],
    grads: Mapping[str, Any],
    uses: Any,
    stats: Any,
) -> dict[str, Any]:
    """Path -> the scores of a parameter's entries."""
    by = as_score(score)
    scored = {}
    for path, (value, layout, stat) in _parameters(by, params, paths, uses, stats).items():
        parameter = Parameter(path, value, layout, stat, grad=grads.get(path))
        found = by.score(parameter, by.keep(parameter))
        if jnp.shape(found) != tuple(value.shape):
            raise ValueError(
                f"the score has shape {jnp.shape(found)} for {parameter.describe()}; it has to "
                "score each entry"
            )
        scored[path] = found
    return scored


def _parameters(by: Score, params: Any, paths: frozenset[str], uses: Any, stats: Any) -> Any:
    """Path -> value, layout and statistics."""
    if is_magnitude(by):
        # It reads no layout, and to assume one would be worth a warning.
        leaves = [(path, as_jax(x)) for path, x in named_leaves(params) if path in paths]
        return {path: (x, assume_layout(x.shape), None) for path, x in leaves}
    return chosen_parameters(params, lambda path, leaf: path in paths, uses, stats)


def along(scores: Any, axis: int, reduce: Reduce) -> np.ndarray:
    """Scores of entries as one number per index of an axis, to be summed over indices."""
    scores = jnp.asarray(scores, jnp.float32)
    others = tuple(i for i in range(scores.ndim) if i != axis)
    if reduce == "max":
        return np.asarray(scores.max(others))
    return np.asarray((jnp.square(scores) if reduce == "l2" else scores).sum(others), np.float64)


def unit_scores(
    scores: Mapping[str, Any], members: list[tuple[str, int, np.ndarray]], reduce: Reduce
) -> np.ndarray:
    """One score per unit, over all entries that go with it.

    Args:
        scores: Path -> the scores of entries.
        members: Path, axis, and the indices of each unit, ``[units, count]``.
        reduce: ``l2``, ``sum``, ``mean`` or ``max``.
    """
    parts, entries = [], 0
    for path, axis, indices in members:
        if path not in scores:
            continue
        found = along(scores[path], axis, reduce)[indices]
        parts.append(found.max(1) if reduce == "max" else found.sum(1))
        entries += scores[path].size // scores[path].shape[axis] * indices.shape[1]
    if reduce == "max":
        return np.max(parts, axis=0)
    total = np.sum(parts, axis=0)
    return np.sqrt(total) if reduce == "l2" else total / (entries if reduce == "mean" else 1)
