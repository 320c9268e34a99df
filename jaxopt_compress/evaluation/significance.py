"""Whether two variants differ by more than noise, from the same examples."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.evaluation.metric import Metric
from jaxopt_compress.evaluation.sums import quotient, spread
from jaxopt_compress.typing import PyTree

_PERMUTATIONS, _RESAMPLES = 2000, 1000
# Beyond so many examples the sums are as good as normal, and resampling takes long.
_FEW = 20_000


@functools.cache
def kept_values(metric: Metric) -> Metric:
    """Keeps, for each example, the sum of a metric's values and of their weights.

    An example is an entry of the first axis: the tokens of one sequence are not independent.
    """
    assert metric.values is not None

    def measure(
        outputs: PyTree, targets: PyTree, weights: jax.Array | None
    ) -> dict[str, jax.Array]:
        values = jnp.asarray(metric.values(outputs, targets))  # pyright: ignore
        wide = values.astype(jnp.float32)
        each = jnp.ones(wide.shape) if weights is None else spread(weights, wide.shape)
        each = each.astype(jnp.float32)
        weighted = jnp.where(each == 0, 0, each * wide)
        axes = tuple(range(1, wide.ndim))
        return {"sums": jnp.sum(weighted, axes), "weights": jnp.sum(each, axes)}

    return Metric(metric.name, measure, lambda kept: kept, keep=True)


def paired_test(
    first: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]
) -> dict[str, object]:
    """Tests whether the means of two variants over the same examples differ.

    Args:
        first: What `kept_values` kept of the first variant.
        other: Those of the other one.

    Returns:
        ``difference`` of the means, other minus first, with ``low`` and ``high`` of its 95%
        interval; ``p``, the probability of a difference of this size or more if there were none;
        ``noise``, whether that is 0.05 or more; and the ``test``. One pair is tested: of twenty
        comparisons without a difference one is expected below 0.05. Right and wrong answers:
        McNemar's test, exact. Other values: random signs of the examples' differences. Intervals
        are those of the bootstrap over examples. With more than 20,000 examples both are normal.

    References:
        McNemar, 1947, Note on the Sampling Error of the Difference Between Correlated Proportions
        or Percentages. Efron and Tibshirani, 1993, An Introduction to the Bootstrap.
    """
    counts = first["weights"] > 0
    a, b, weights = (x[counts] for x in (first["sums"], other["sums"], first["weights"]))
    moved, total = b - a, weights.sum()
    difference = quotient((moved.sum(), total))
    yes_or_no = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all() and (weights == 1).all())
    known = bool(np.isfinite(moved).all() and len(moved))
    if yes_or_no:
        p = mcnemar(int((moved < 0).sum()), int((moved > 0).sum()))
    else:
        p = sign_test(moved) if known else math.nan
    low, high = bootstrap(moved, weights) if known else (math.nan, math.nan)
    test = "McNemar" if yes_or_no else "paired permutation"
    noise = not p < 0.05
    return {
        "difference": difference,
        "low": low,
        "high": high,
        "p": p,
        "noise": noise,
        "test": test,
    }


def mcnemar(worse: int, better: int) -> float:
    """The exact two-sided probability of such a split of the examples that changed.

    Example:
        >>> round(mcnemar(1, 7), 6)
        0.070312
    """
    n, k = worse + better, min(worse, better)
    if n == 0:
        return 1.0
    log_ways = lambda i: math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
    tail = math.fsum(math.exp(log_ways(i) - n * math.log(2)) for i in range(k + 1))
    return min(1.0, 2 * tail)


def sign_test(moved: np.ndarray) -> float:
    """The two-sided probability of a sum of this size if signs were random."""
    size = abs(moved.sum())
    if len(moved) > _FEW:
        spread_of_sum = math.sqrt(np.square(moved).sum())
        return math.erfc(size / spread_of_sum / math.sqrt(2)) if spread_of_sum else 1.0
    rng, extreme = np.random.default_rng(0), 0
    for rows in _chunks(_PERMUTATIONS, len(moved)):
        bits = np.unpackbits(rng.integers(0, 256, (rows, -(-len(moved) // 8)), np.uint8), axis=1)
        sums = (2.0 * bits[:, : len(moved)] - 1) @ moved
        extreme += int((np.abs(sums) >= size * (1 - 1e-12)).sum())
    return (extreme + 1) / (_PERMUTATIONS + 1)


def bootstrap(moved: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the mean difference over resampled examples."""
    n, mean = len(moved), moved.sum() / weights.sum()
    if n > _FEW:
        error = math.sqrt(np.square(moved - mean * weights).sum()) / weights.sum()
        return mean - 1.959964 * error, mean + 1.959964 * error
    rng, found = np.random.default_rng(1), []
    for rows in _chunks(_RESAMPLES, n):
        at = rng.integers(0, n, (rows, n), np.int32)
        found.append(moved[at].sum(1) / weights[at].sum(1))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return float(low), float(high)


def _chunks(rows: int, columns: int) -> list[int]:
    """Numbers of rows that add up, each of some megabytes at most."""
    step = max(1, 2_000_000 // max(columns, 1))
    return [min(step, rows - at) for at in range(0, rows, step)]
