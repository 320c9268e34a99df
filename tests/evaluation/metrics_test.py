"""Metrics against scikit-learn and scipy, whatever the batches, classes, ties and weights."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxopt_compress as jc

sklearn = pytest.importorskip("sklearn.metrics")

CLASSES = 6
BY_CLASS = [f"{kind}_{way}" for kind in ("precision", "recall", "f1") for way in ("macro", "micro")]
COUNTED = ["accuracy", "top5", *BY_CLASS]
# Sums of counts and of weights in halves are exact; means of float32 losses are not.
EXACT, FLOAT32 = {"rel": 1e-14}, {"rel": 2e-6}


def identity(params, x):
    return x


def measure(metrics, splits, outputs, targets, weights=None):
    """The metrics of a model that returns its inputs, in batches of the given lengths."""
    weights = np.ones(len(outputs), np.float32) if weights is None else weights
    batches = []
    for part in np.split(np.arange(len(outputs)), np.cumsum(splits)):
        # One shape for all, so that little is compiled: what is missing has weight 0.
        filled = [np.zeros((24, *x.shape[1:]), x.dtype) for x in (outputs, targets, weights)]
        for new, x in zip(filled, (outputs, targets, weights), strict=True):
            new[: len(part)] = x[part]
        batches.append(tuple(filled))
    return jc.evaluate(identity, {}, batches, metrics)


@st.composite
def classified(draw):
    """Few levels make ties, few examples make classes that are absent or alone."""
    n, levels = draw(st.integers(1, 24)), draw(st.sampled_from([2, 3, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = (rng.integers(0, levels, (n, CLASSES)) / levels * 8).astype(np.float32)
    targets = rng.integers(0, draw(st.integers(1, CLASSES)), n).astype(np.int32)
    weights = rng.integers(0, 4, n).astype(np.float32) / 2
    weights[0] = 1
    return draw(st.lists(st.integers(0, 8), max_size=2)), scores, targets, weights


def expected(scores, targets, weights):
    counts = weights > 0  # scikit-learn takes classes of weight 0 into its means
    scores, targets, weights = scores[counts], targets[counts], weights[counts]
    answers = scores.argmax(-1)
    # Of equal scores scikit-learn takes the last ones.
    ordered = scores.astype(np.float64) - 1e-9 * np.arange(CLASSES)
    top5 = {"k": 5, "labels": range(CLASSES), "sample_weight": weights}
    found = {
        "accuracy": sklearn.accuracy_score(targets, answers, sample_weight=weights),
        "top5": sklearn.top_k_accuracy_score(targets, ordered, **top5),
    }
    for name in BY_CLASS:
        kind, average = name.split("_")
        score = getattr(sklearn, f"{kind}_score")
        how = {"average": average, "sample_weight": weights, "zero_division": 0}
        found[name] = score(targets, answers, **how)
    return found


@settings(max_examples=60, deadline=None)
@given(classified())
def test_counts_are_those_of_scikit_learn(case):
    splits, scores, targets, weights = case
    found = measure(COUNTED, splits, scores, targets, weights)
    assert found == pytest.approx(expected(scores, targets, weights), **EXACT)


def test_counts_without_weights_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(50, CLASSES)), rng.integers(0, CLASSES, 50)
    batches = [(scores[i : i + 20], targets[i : i + 20]) for i in (0, 20, 40)]
    found = jc.evaluate(identity, {}, batches, COUNTED)
    assert found == pytest.approx(expected(scores, targets, np.ones(50)), **EXACT)


@settings(max_examples=30, deadline=None)
@given(classified())
def test_losses_are_those_of_scipy(case):
    splits, scores, targets, weights = case
    log_p = scipy.special.log_softmax(scores.astype(np.float64), axis=-1)
    loss = np.average(-log_p[np.arange(len(targets)), targets], weights=weights)
    found = measure(["cross_entropy", "perplexity"], splits, scores, targets, weights)
    # A loss near 0 is the difference of numbers up to 8.
    assert found["cross_entropy"] == pytest.approx(loss, abs=8 * 2**-22)
    assert found["perplexity"] == pytest.approx(np.exp(loss), rel=8 * 2**-22)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=24),
    st.lists(st.integers(0, 8), max_size=2),
    st.randoms(use_true_random=False),
)
def test_correlation_and_error_are_those_of_scipy(pairs, splits, random):
    x, y = np.asarray(pairs, np.float32).T
    found = measure(["spearman", "rmse"], splits, x, y)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((x - y) ** 2)), **FLOAT32)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert np.isnan(found["spearman"])
    else:
        expected = scipy.stats.spearmanr(x, y).statistic
        assert found["spearman"] == pytest.approx(expected, abs=1e-14)


def test_errors_are_weighted():
    x, y, w = (np.asarray(v, np.float32) for v in ([1, 2, 9], [0, 0, 0], [1, 3, 0]))
    found = measure(["rmse"], [1], x, y, w)["rmse"]
    assert found == pytest.approx(np.sqrt((1 + 3 * 4) / 4), **FLOAT32)


def test_tokens_are_examples_and_a_sequence_may_have_one_weight():
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(3, 5, 4)).astype("f4"), rng.integers(0, 4, (3, 5))
    flat = [(scores[:2].reshape(10, 4), targets[:2].reshape(10))]
    weights = np.array([1.0, 1.0, 0.0])
    metrics = ["perplexity", "accuracy", "f1_macro"]
    whole = jc.evaluate(identity, {}, [(scores, targets, weights)], metrics)
    assert whole == pytest.approx(jc.evaluate(identity, {}, flat, metrics), **FLOAT32)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "bfloat16"])
def test_masks_of_any_type_count_far(dtype):
    """600 examples of one class: more than uint8 and the integers of bfloat16 hold."""
    scores, targets = np.eye(2, dtype=np.float32)[np.zeros(600, int)], np.zeros(600, np.int32)
    batch = (scores, targets, jnp.ones(600, dtype))
    found = jc.evaluate(identity, {}, [batch], ["per_class"])["per_class"]
    assert found["support"][0] == 600 and found["recall"][0] == 1


def test_targets_that_are_no_class_count_for_none():
    """Above 100 classes, -100 would count from the end; and -1 is what answers of NaN are."""
    scores, targets = np.eye(120, dtype=np.float32), np.arange(120, dtype=np.int32)
    targets[7] = -100
    found = jc.evaluate(identity, {}, [(scores, targets)], ["per_class"])["per_class"]
    assert sum(found["support"]) == 119 and max(found["support"]) == 1
    none = np.full((1, CLASSES), np.nan, np.float32)
    assert measure(["accuracy"], [], none, np.array([-1], np.int32))["accuracy"] == 0.0


def test_large_counts_are_exact():
    """Sums over batches are kept in 64 bits: in float32 2**24 + 1 is lost."""
    one = lambda outputs, targets: jnp.ones(outputs.shape, jnp.int32)
    many = jnp.zeros((2**12, 2**12), jnp.int8)
    found = jc.metrics.Metric("count", jc.metrics.mean(one).measure, lambda sums: sums[1])
    batches = [(many, many), (many[:1, :1], many[:1, :1])]
    assert jc.evaluate(identity, {}, batches, [found]) == {"count": 2**24 + 1}


@pytest.mark.parametrize("name", ["accuracy", "top5", "f1_micro", "f1_macro"])
def test_scores_with_nan_are_never_right(name):
    scores = np.zeros((2, CLASSES), np.float32)
    scores[0, 3] = np.nan
    for target in range(5):
        found = measure([name], [], scores, np.asarray([target, 0], np.int32))[name]
        assert found < 1
    # The answer that there is is right, that which there is not counts as missed.
    assert measure(["accuracy"], [], scores, np.zeros(2, np.int32))["accuracy"] == 0.5


def test_what_has_no_weight_may_be_nan():
    scores = np.array([[np.nan, np.nan], [1.0, 0.0]], np.float32)
    found = measure(
        ["cross_entropy", "accuracy"], [], scores, np.zeros(2, np.int32), np.float32([0, 1])
    )
    assert found == {"cross_entropy": pytest.approx(np.log1p(np.exp(-1))), "accuracy": 1.0}
    nothing = measure(
        ["accuracy", "f1_macro"], [], scores, np.zeros(2, np.int32), np.zeros(2, "f4")
    )
    assert np.isnan(list(nothing.values())).all()


@pytest.mark.parametrize(
    ("metrics", "error", "message"),
    [
        (["acuracy"], ValueError, "there is no metric 'acuracy'; there are accuracy, top5"),
        ([], ValueError, "metrics is empty"),
        (["rmse", "rmse"], ValueError, "two metrics have the name 'rmse'"),
        ([jc.metrics.f1], TypeError, "metrics.f1 makes a metric: call it"),
        ([3], TypeError, "3 is not a metric"),
        (["rmse"], ValueError, r"outputs have shape \(2, 3\), targets \(2,\)"),
        (["spearman"], ValueError, r"outputs have shape \(2, 3\), targets \(2,\)"),
        (["top5"], ValueError, r"top_k\(5\) of scores of 3 classes"),
        ([lambda o, t: 1.0], ValueError, "returns a scalar: return one value per example"),
    ],
)
def test_errors_say_what_would_work(metrics, error, message):
    batch = (jnp.ones((2, 3)), jnp.zeros(2, jnp.int32))
    with pytest.raises(error, match=message):
        jc.evaluate(identity, {}, [batch], metrics)


def test_targets_of_classes_are_integers():
    with pytest.raises(ValueError, match=r"not outputs float32\[2, 3\] and targets float32\[2\]"):
        jc.evaluate(identity, {}, [(jnp.ones((2, 3)), jnp.zeros(2))], ["accuracy"])
    with pytest.raises(ValueError, match=r"weights of shape \(3,\)"):
        batch = (jnp.ones((2, 3)), jnp.zeros(2, jnp.int32), jnp.ones(3))
        jc.evaluate(identity, {}, [batch], ["accuracy"])
    with pytest.raises(ValueError, match="average='weighted'"):
        jc.metrics.f1("weighted")


def test_ranks_have_no_fractional_weights():
    with pytest.raises(ValueError, match="weights of 0 and 1"):
        measure(["spearman"], [], np.arange(3.0), np.arange(3.0), np.float32([1, 0.5, 1]))


def test_marks_of_ignored_targets_are_left_out_by_weights_and_nan_without():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    targets = jnp.array([1, -100, 2, -1, 0, 3])
    batch = (scores, targets)
    found = jc.evaluate(lambda params, x: x, {}, [batch], ["cross_entropy"])
    assert np.isnan(found["cross_entropy"])
    known = targets >= 0
    left = jc.evaluate(lambda params, x: x, {}, [(*batch, known)], ["cross_entropy"])
    only = jc.evaluate(
        lambda params, x: x, {}, [(scores[known], targets[known])], ["cross_entropy"]
    )
    np.testing.assert_allclose(left["cross_entropy"], only["cross_entropy"], rtol=1e-6)
