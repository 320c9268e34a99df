"""Metrics that compare examples with each other: correlation of ranks, area under the curve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.evaluation.metric import Metric
from jaxopt_compress.evaluation.scores import check_scores
from jaxopt_compress.evaluation.sums import quotient, spread
from jaxopt_compress.typing import Leaf, PyTree


def spearman() -> Metric:
    """Spearman's rank correlation of outputs ``[n]`` and targets ``[n]``; ties share their mean.

    NaN where either is constant. All pairs are kept; weights are 0 or 1, for examples that count or
    not.

    References:
        Spearman, 1904, The Proof and Measurement of Association between Two Things.
    """
    return _SPEARMAN


@functools.cache
def auc(average: str = "macro") -> Metric:
    r"""The area under the ROC curve, exact: all scores are kept.

    .. math:: P(s_+ > s_-) + \tfrac12 P(s_+ = s_-)

    for a positive and a negative example. Outputs ``[*examples]`` with targets 0 and 1 are scores
    of class 1, and of outputs ``[*examples, 2]`` it is the difference. With more classes each is
    compared with all others by its log-probability (one against the rest).

    Args:
        average: ``"macro"``: the mean over classes that are a target of some examples and not of
            others; ``"weighted"``: the same by how often they are a target.

    Returns:
        The metric; NaN where there is no such class, or a score is NaN.

    References:
        Fawcett, 2006, An Introduction to ROC Analysis.
    """
    if average not in ("macro", "weighted"):
        raise ValueError(f"average={average!r}; it is 'macro' or 'weighted'")
    name = "auc" if average == "macro" else "auc_weighted"
    return Metric(name, _kept_scores, functools.partial(_area, average == "weighted"), keep=True)


def area(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> float:
    """The area under the ROC curve of scores ``[n]``; NaN if all or none are positive."""
    if np.isnan(scores).any():
        return np.nan
    at = np.unique(scores, return_inverse=True)[1]
    count = lambda chosen: np.bincount(at, np.where(chosen, weights, 0))
    ups, downs = count(positive), count(~positive)
    below = np.cumsum(downs) - downs / 2
    return quotient((ups @ below, ups.sum() * downs.sum()))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def check_same(outputs: PyTree, targets: PyTree) -> None:
    """Raises a ValueError unless outputs and targets have one shape."""
    shapes = tuple(jnp.shape(outputs)), tuple(jnp.shape(targets))
    if shapes[0] != shapes[1]:
        raise ValueError(f"outputs have shape {shapes[0]}, targets {shapes[1]}; they are compared "
                         "entry by entry")  # fmt: skip


def _kept_scores(
    outputs: jax.Array, targets: jax.Array, weights: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores ``[n, classes]``, or ``[n, 1]`` of two classes, with targets and weights ``[n]``."""
    scores = outputs.astype(jnp.float32)
    if outputs.shape == targets.shape:
        scores = scores[..., None]
    else:
        check_scores(outputs, targets)
        two = scores.shape[-1] == 2
        scores = scores[..., 1:] - scores[..., :1] if two else jax.nn.log_softmax(scores)
    weights = jnp.ones(targets.shape) if weights is None else spread(weights, targets.shape)
    return scores.reshape(-1, scores.shape[-1]), targets.ravel().astype(int), weights.ravel()


def _area(weighted: bool, kept: Leaf) -> float:
    scores, targets, weights = (x[kept[2] > 0] for x in kept)
    classes = [1] if scores.shape[1] == 1 else range(scores.shape[1])
    areas = [area(s, targets == c, weights) for s, c in zip(scores.T, classes, strict=True)]
    there = np.array([weights[targets == c].sum() for c in classes])
    known = (there > 0) & (there < weights.sum())
    return quotient((np.array(areas)[known] @ there[known], there[known].sum())) if weighted else (
        float(np.mean(areas, where=known)) if known.any() else np.nan
    )  # fmt: skip


def _pairs(
    outputs: PyTree, targets: PyTree, weights: jax.Array | None
) -> tuple[PyTree, PyTree, jax.Array]:
    check_same(outputs, targets)
    if jnp.ndim(outputs) != 1:
        raise ValueError(f"spearman takes outputs of shape [n], not {tuple(jnp.shape(outputs))}")
    counts = jnp.ones(outputs.shape) if weights is None else weights
    return outputs, targets, counts


def _rank_correlation(kept: Leaf) -> float:
    outputs, targets, counts = kept
    if not np.isin(counts, (0, 1)).all():
        raise ValueError("spearman takes weights of 0 and 1: ranks of parts are not defined")
    x, y = (values[counts > 0] for values in (outputs, targets))
    if np.isnan(x).any() or np.isnan(y).any():
        return np.nan
    x, y = (r - r.mean() if r.size else r for r in (ranks(x), ranks(y)))
    return quotient((x @ y, np.sqrt((x @ x) * (y @ y))))


_SPEARMAN = Metric("spearman", _pairs, _rank_correlation, keep=True)
