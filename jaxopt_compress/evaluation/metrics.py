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

What is no mean is a `Metric`:

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
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_compress.evaluation.scores import (
    check_scores,
    class_counts,
    has_nan,
    negative_log_likelihood,
    right,
)
from jaxopt_compress.evaluation.sums import count, quotient, ratio, weighted_sum

__all__ = [
    "Metric",
    "accuracy",
    "cross_entropy",
    "f1",
    "mean",
    "perplexity",
    "precision",
    "recall",
    "rmse",
    "spearman",
    "top_k",
]


class Metric(NamedTuple):
    """A figure of all examples of all batches.

    It is a key of what is compiled: take functions of a module, not ones made anew for each call.

    Attributes:
        name: Under which it is returned.
        measure: ``measure(outputs, targets, weights)`` of one batch: a tree of arrays. It is
            compiled; ``weights`` are None or of the shape ``[*examples]``.
        result: ``result(tree)``: the figure, from the sums over batches as NumPy arrays, float64
            or int64.
        keep: Whether arrays are kept and joined along their first axis, for what sums cannot tell,
            such as ranks. Memory then grows with the number of examples.
    """

    name: str
    measure: Callable[[Any, Any, jax.Array | None], Any]
    result: Callable[[Any], Any]
    keep: bool = False


Metrics = Iterable[str | Callable[..., Any] | Metric]


@functools.cache
def mean(function: Callable[[Any, Any], jax.Array], name: str | None = None) -> Metric:
    """The weighted mean of ``function(outputs, targets)``, an array ``[*examples]``.

    What `evaluate` makes of a plain function.

    Args:
        function: One value per example.
        name: Of the metric; by default the function's.
    """
    called: str = name or getattr(function, "__name__", type(function).__name__)

    def measure(outputs: Any, targets: Any, weights: Any) -> Any:
        values = jnp.asarray(function(outputs, targets))
        if values.ndim == 0:
            raise ValueError(
                f"the metric {called!r} returns a scalar: return one value per example, and the "
                "mean over all batches is taken"
            )
        return weighted_sum(values, weights), count(values.shape, weights)

    return Metric(called, measure, quotient)


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


def rmse() -> Metric:
    """The root of the mean squared error over all entries; targets have the shape of outputs."""
    return _RMSE


def spearman() -> Metric:
    """Spearman's rank correlation of outputs ``[n]`` and targets ``[n]``; ties share their mean.

    NaN where either is constant. All pairs are kept; weights are 0 or 1, for examples that count or
    not.

    References:
        Spearman, 1904, The Proof and Measurement of Association between Two Things.
    """
    return _SPEARMAN


def checked(metrics: Metrics) -> tuple[Metric, ...]:
    """The metrics, once it is sure that they are some, under different names.

    Raises:
        TypeError: One is no name, function or `Metric`.
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
    if any(metric is x for x in (accuracy, f1, perplexity, precision, recall, rmse, spearman)):
        raise TypeError(f"metrics.{metric.__name__} makes a metric: call it")
    if callable(metric):
        return mean(metric)
    raise TypeError(f"{metric!r} is no metric: pass a name, a function or a Metric")


_BY_NAME: dict[str, Callable[[], Metric]] = {
    "accuracy": accuracy,
    "top5": functools.partial(top_k, 5),
    "precision_macro": precision,
    "precision_micro": functools.partial(precision, "micro"),
    "recall_macro": recall,
    "recall_micro": functools.partial(recall, "micro"),
    "f1_macro": f1,
    "f1_micro": functools.partial(f1, "micro"),
    "cross_entropy": cross_entropy,
    "perplexity": perplexity,
    "rmse": rmse,
    "spearman": spearman,
}


def _check_same(outputs: Any, targets: Any) -> None:
    shapes = tuple(jnp.shape(outputs)), tuple(jnp.shape(targets))
    if shapes[0] != shapes[1]:
        raise ValueError(f"outputs have shape {shapes[0]}, targets {shapes[1]}; they are compared "
                         "entry by entry")  # fmt: skip


def _squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    _check_same(outputs, targets)
    return (outputs.astype(jnp.float32) - targets.astype(jnp.float32)) ** 2


def _of_classes(kind: str, average: str, formula: Callable[..., Any]) -> Metric:
    if average not in ("macro", "micro"):
        raise ValueError(f"average={average!r}; it is 'macro' or 'micro'")

    def result(counts: Any) -> float:
        hits, answered, there = (np.asarray(c, np.float64) for c in counts)
        if average == "micro":
            return float(formula(*(c.sum(keepdims=True) for c in (hits, answered, there)))[0])
        known = answered + there > 0
        return float(formula(hits, answered, there)[known].mean()) if known.any() else np.nan

    return Metric(f"{kind}_{average}", class_counts, result)


def _pairs(outputs: Any, targets: Any, weights: jax.Array | None) -> Any:
    _check_same(outputs, targets)
    if jnp.ndim(outputs) != 1:
        raise ValueError(f"spearman takes outputs of shape [n], not {tuple(jnp.shape(outputs))}")
    counts = jnp.ones(outputs.shape) if weights is None else weights
    return outputs, targets, counts


def _rank_correlation(kept: Any) -> float:
    outputs, targets, counts = kept
    if not np.isin(counts, (0, 1)).all():
        raise ValueError("spearman takes weights of 0 and 1: ranks of parts are not defined")
    x, y = (values[counts > 0] for values in (outputs, targets))
    if np.isnan(x).any() or np.isnan(y).any():
        return np.nan
    x, y = (r - r.mean() if r.size else r for r in (_ranks(x), _ranks(y)))
    return quotient((x @ y, np.sqrt((x @ x) * (y @ y))))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


_CROSS_ENTROPY = mean(negative_log_likelihood, "cross_entropy")
_exp = lambda sums: float(np.exp(quotient(sums)))
_root = lambda sums: float(np.sqrt(quotient(sums)))
_PERPLEXITY = Metric("perplexity", _CROSS_ENTROPY.measure, _exp)
_RMSE = Metric("rmse", mean(_squared_error).measure, _root)
_SPEARMAN = Metric("spearman", _pairs, _rank_correlation, keep=True)
