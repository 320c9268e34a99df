"""Metrics for `evaluate` and `compare`: sums over batches, and what is made of them.

Outputs of classifiers and language models are scores, ``[*examples, classes]``, and their targets
integers, ``[*examples]``; the answer is the first class of the highest score. A row of scores with
a NaN answers nothing, so it is never right. Examples of weight 0 count as if they were not there.

The mean over examples of something else is a plain function of outputs and targets:

    >>> import jax.numpy as jnp, jaxopt_compress as jc
    >>> def absolute_error(outputs, targets):  # one value per example
    ...     return jnp.abs(outputs - targets)
    >>> batches = [(jnp.arange(3.0), jnp.zeros(3)), (jnp.arange(5.0), jnp.zeros(5))]
    >>> jc.evaluate(lambda params, x: params * x, jnp.float32(2), batches, [absolute_error])
    {'absolute_error': 3.25}

Anything but a mean is a `Metric`:

    >>> largest = jc.metrics.Metric(
    ...     "largest",
    ...     measure=lambda outputs, targets, weights: jnp.abs(outputs - targets),
    ...     result=lambda errors: errors.max(),
    ...     keep=True,
    ... )
    >>> jc.evaluate(lambda params, x: params * x, 2.0, batches, [largest])
    {'largest': 8.0}
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_compress.evaluation.metric import Metric, Metrics, mean
from jaxopt_compress.evaluation.ranks import auc, check_same, spearman
from jaxopt_compress.evaluation.reliability import calibration_error
from jaxopt_compress.evaluation.retrieval import ndcg_at, precision_at, recall_at
from jaxopt_compress.evaluation.scores import (
    check_scores,
    class_counts,
    has_nan,
    negative_log_likelihood,
    right,
)
from jaxopt_compress.evaluation.sums import quotient, ratio

__all__ = [
    "Metric",
    "accuracy",
    "auc",
    "calibration_error",
    "cross_entropy",
    "f1",
    "mean",
    "ndcg_at",
    "per_class",
    "perplexity",
    "precision",
    "precision_at",
    "recall",
    "recall_at",
    "rmse",
    "spearman",
    "top_k",
]


def accuracy() -> Metric:
    """The share of examples that are answered right."""
    return mean(right, "accuracy")


@functools.cache
def top_k(k: int) -> Metric:
    """The share of examples of which the target is among the ``k`` highest scores.

    Of equal scores the first ones are taken, so that ``top_k(1)`` is `accuracy`.

    Raises:
        ValueError: In a call, there are fewer than ``k`` classes.
    """

    def hit(scores: jax.Array, targets: jax.Array) -> jax.Array:
        check_scores(scores, targets)
        if not 1 <= k <= scores.shape[-1]:
            raise ValueError(f"top_k({k}) of scores of {scores.shape[-1]} classes")
        best = lax.top_k(scores, k)[1]
        return jnp.any(best == targets[..., None], axis=-1) & ~has_nan(scores)

    return mean(hit, f"top{k}")


def cross_entropy() -> Metric:
    """The mean of ``-log softmax(scores)[target]``, in nats."""
    return _CROSS_ENTROPY


def perplexity() -> Metric:
    """``exp`` of the cross-entropy over all tokens of all batches."""
    return _PERPLEXITY


@functools.cache
def precision(average: str = "macro") -> Metric:
    """Right answers over answers, ``TP / (TP + FP)``, by class.

    Args:
        average: ``"macro"``: the mean over classes that are a target or an answer; a class that is
            never answered has 0. ``"micro"``: of all classes together.
    """
    return _of_classes("precision", average, lambda hits, answered, there: ratio(hits, answered))


@functools.cache
def recall(average: str = "macro") -> Metric:
    """Right answers over targets, ``TP / (TP + FN)``, by class.

    Args:
        average: As in `precision`; a class that is answered and never a target has 0.
    """
    return _of_classes("recall", average, lambda hits, answered, there: ratio(hits, there))


@functools.cache
def f1(average: str = "macro") -> Metric:
    """The harmonic mean of precision and recall, ``2 TP / (2 TP + FP + FN)``, by class.

    Args:
        average: As in `precision`. With one target and one answer per example, ``"micro"`` is the
            accuracy.
    """
    return _of_classes(
        "f1", average, lambda hits, answered, there: ratio(2 * hits, answered + there)
    )


def per_class() -> Metric:
    """Precision, recall and F1 of each class, and the weight of its examples (support).

    A dict of lists over classes. Recall is the accuracy within a class. Classes
    that are neither a target nor an answer have zeros.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> batches = [(jnp.eye(3), jnp.array([0, 1, 1]))]
        >>> jc.evaluate(lambda params, x: x, {}, batches, ["per_class"])["per_class"]["recall"]
        [1.0, 0.5, 0.0]
    """
    return _PER_CLASS


def rmse() -> Metric:
    """The root of the mean squared error over all entries; targets have the shape of outputs."""
    return _RMSE


def checked(metrics: Metrics) -> tuple[Metric, ...]:
    """The metrics, once it is sure that they are some, under different names.

    Raises:
        TypeError: One is neither a name, a function nor a `Metric`.
        ValueError: There are none, a name is unknown, or two have the same.
    """
    single = isinstance(metrics, str | Metric) or callable(metrics)
    chosen = tuple(map(_metric, [metrics] if single else metrics))
    if not chosen:
        raise ValueError(f"metrics is empty: pass some, such as {', '.join(_BY_NAME)}")
    names = [m.name for m in chosen]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"two metrics have the name {twice[0]!r}: pass metrics.mean(fn, name)")
    return chosen


def _metric(metric: Any) -> Metric:
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in _BY_NAME:
            raise ValueError(f"there is no metric {metric!r}; there are {', '.join(_BY_NAME)}")
        return _BY_NAME[metric]()
    for name, make in _BY_NAME.items():
        if metric is make:
            raise TypeError(f"metrics.{metric.__name__} makes a metric: call it, or say {name!r}")
    if callable(metric):
        return mean(metric)
    raise TypeError(f"{metric!r} is not a metric: pass a name, a function or a Metric")


_BY_NAME: dict[str, Callable[[], Metric]] = {
    "accuracy": accuracy,
    "top5": functools.partial(top_k, 5),
    "precision_macro": precision,
    "precision_micro": functools.partial(precision, "micro"),
    "recall_macro": recall,
    "recall_micro": functools.partial(recall, "micro"),
    "per_class": per_class,
    "auc": auc,
    "calibration_error": calibration_error,
    "f1_macro": f1,
    "f1_micro": functools.partial(f1, "micro"),
    "cross_entropy": cross_entropy,
    "perplexity": perplexity,
    "rmse": rmse,
    "spearman": spearman,
}


def _squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    check_same(outputs, targets)
    return (outputs.astype(jnp.float32) - targets.astype(jnp.float32)) ** 2


def _of_classes(kind: str, average: str, formula: Callable[..., np.ndarray]) -> Metric:
    if average not in ("macro", "micro"):
        raise ValueError(f"average={average!r}; it is 'macro' or 'micro'")

    def result(counts: Sequence[np.ndarray]) -> float:
        hits, answered, there = (np.asarray(c, np.float64) for c in counts)
        if average == "micro":
            return float(formula(*(c.sum(keepdims=True) for c in (hits, answered, there)))[0])
        known = answered + there > 0
        return float(formula(hits, answered, there)[known].mean()) if known.any() else np.nan

    return Metric(f"{kind}_{average}", class_counts, result)


def _table(counts: Sequence[np.ndarray]) -> dict[str, list[float]]:
    hits, answered, there = (np.asarray(c, np.float64) for c in counts)
    table = {
        "precision": ratio(hits, answered),
        "recall": ratio(hits, there),
        "f1": ratio(2 * hits, answered + there),
        "support": there,
    }
    return {name: figures.tolist() for name, figures in table.items()}


_PER_CLASS = Metric("per_class", class_counts, _table)
_CROSS_ENTROPY = mean(negative_log_likelihood, "cross_entropy")
_exp = lambda sums: float(np.exp(quotient(sums)))
_root = lambda sums: float(np.sqrt(quotient(sums)))
_PERPLEXITY = Metric("perplexity", _CROSS_ENTROPY.measure, _exp)
_RMSE = Metric("rmse", mean(_squared_error).measure, _root)
