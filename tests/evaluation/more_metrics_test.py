"""Areas under curves, calibration, rankings and classes against scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import jaxopt_compress as jc

sklearn = pytest.importorskip("sklearn.metrics")
N = 24


def identity(params, x):
    return x


def measured(metric, outputs, targets, weights, put=jnp.asarray):
    """In two batches of one shape."""
    halves = [[put(part) for part in np.split(x, 2)] for x in (outputs, targets, weights)]
    half = list(zip(*halves, strict=True))
    return jc.evaluate(identity, {}, half, [metric])


@st.composite
def scored(draw, classes):
    """Few levels make ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.integers(0, draw(st.sampled_from([3, 1000])), (N, classes)) / 8
    targets = np.concatenate([np.arange(classes), rng.integers(0, classes, N - classes)])
    weights = rng.integers(1, 4, N) / 2
    weights[classes:] *= rng.integers(0, 2, N - classes)
    return scores.astype("f4"), rng.permuted(targets).astype("i4"), weights.astype("f4")


@settings(max_examples=20, deadline=None)
@given(scored(2))
def test_areas_of_two_classes_are_those_of_scikit_learn(case):
    scores, targets, weights = case
    there = [weights[targets == c].sum() > 0 for c in (0, 1)]
    found = measured("auc", *case)["auc"]
    if not all(there):
        assert np.isnan(found)
        return
    margin = scores[:, 1] - scores[:, 0]
    want = sklearn.roc_auc_score(targets, margin, sample_weight=weights)
    assert found == pytest.approx(want, rel=1e-12)
    assert measured("auc", margin, targets, weights)["auc"] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("average", ["macro", "weighted"])
def test_areas_of_classes_against_the_rest_are_those_of_scikit_learn(average):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(N, 5)).astype("f4")
    targets = np.concatenate([np.arange(5), rng.integers(0, 5, N - 5)]).astype("i4")
    shares = np.asarray(jax.nn.softmax(logits.astype("f8")), "f8")
    want = sklearn.roc_auc_score(
        targets, shares / shares.sum(-1, keepdims=True), multi_class="ovr", average=average
    )
    metric = jc.metrics.auc(average)
    found = measured(metric, logits, targets, np.ones(N, "f4"))
    assert found == {metric.name: pytest.approx(want, rel=1e-12)}


def test_scores_that_are_nan_have_no_area():
    scores = np.array([[0, 1], [1, np.nan], [3, 1], [2, 1]], "f4")
    assert np.isnan(measured("auc", scores, np.array([1, 0, 0, 0]), np.ones(4))["auc"])
    left_out = measured("auc", scores, np.array([1, 0, 0, 0]), np.array([1, 0, 1, 1.0]))
    assert left_out == {"auc": 1.0}


def test_calibration_is_that_of_the_bins_of_scikit_learn():
    calibration = pytest.importorskip("sklearn.calibration")
    rng = np.random.default_rng(0)
    logits = (2 * rng.normal(size=(200, 2))).astype("f4")
    targets = rng.integers(0, 2, 200).astype("i4")
    confidence = np.asarray(jax.nn.softmax(jnp.asarray(logits))).max(-1)
    right = logits.argmax(-1) == targets
    rates, means = calibration.calibration_curve(right, confidence, n_bins=10)
    counts = np.histogram(confidence, np.linspace(0, 1, 11))[0]
    want = counts[counts > 0] @ np.abs(rates - means) / 200
    metric = jc.metrics.calibration_error(10)
    found = measured(metric, logits, targets, np.ones(200, "f4"))["calibration_error"]
    assert found == pytest.approx(want, rel=1e-5)  # sums of float32
    # An example that does not count may be anything.
    logits[0] = np.nan
    weights = np.ones(200, "f4")
    assert np.isnan(measured(metric, logits, targets, weights)["calibration_error"])
    weights[0] = 0
    assert np.isfinite(measured(metric, logits, targets, weights)["calibration_error"])


def test_rankings_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(12.0), (N, 1)), axis=1).astype("f4")
    relevance = rng.integers(0, 4, (N, 12)) * rng.integers(0, 2, (N, 12))
    relevance[0] = 0
    weights = (rng.integers(0, 3, N) / 2).astype("f4")
    run = lambda make, k: next(iter(measured(make(k), scores, relevance, weights).values()))
    want = sklearn.ndcg_score(relevance, scores, k=5, sample_weight=weights)
    assert run(jc.metrics.ndcg_at, 5) == pytest.approx(want, rel=1e-6)
    first = np.argsort(-scores, axis=1)[:, :5]
    answered = np.zeros_like(relevance)
    np.put_along_axis(answered, first, 1, axis=1)
    given_ = {"average": "samples", "sample_weight": weights, "zero_division": 0}
    hits = sklearn.precision_score(relevance > 0, answered, **given_)
    assert run(jc.metrics.precision_at, 5) == pytest.approx(hits, rel=1e-6)
    found = sklearn.recall_score(relevance > 0, answered, **given_)
    assert run(jc.metrics.recall_at, 5) == pytest.approx(found, rel=1e-6)
    with pytest.raises(ValueError, match=r"ndcg_at\(13\)"):
        run(jc.metrics.ndcg_at, 13)


def test_classes_are_those_of_scikit_learn_of_sharded_batches_too():
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(32, 5)).astype("f4"), rng.integers(0, 4, 32)
    weights = (rng.integers(0, 3, 32) / 2).astype("f4")
    want = sklearn.precision_recall_fscore_support(
        targets, scores.argmax(-1), labels=range(5), sample_weight=weights, zero_division=0
    )
    mesh = jax.make_mesh((8,), ("data",))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    for found in (
        measured("per_class", scores, targets, weights),
        measured("per_class", scores, targets, weights, put),
    ):
        for name, figures in zip(("precision", "recall", "f1", "support"), want, strict=True):
            np.testing.assert_allclose(found["per_class"][name], figures, rtol=1e-12)
    assert measured("auc", scores, targets, weights, put) == measured(
        "auc", scores, targets, weights
    )


def test_scores_of_nan_rank_nothing():
    """`lax.top_k` puts NaN first."""
    scores, relevance = np.full((1, 6), np.nan, np.float32), np.array([[1, 1, 0, 0, 0, 0]])
    metrics = [jc.metrics.ndcg_at(2), jc.metrics.recall_at(2), jc.metrics.precision_at(2)]
    found = jc.evaluate(lambda params, x: x, {}, [(scores, relevance)], metrics)
    assert set(found.values()) == {0.0}


def test_makers_of_metrics_are_called():
    with pytest.raises(TypeError, match="auc makes a metric"):
        measured(jc.metrics.auc, np.ones((2, 2)), np.ones(2, int), np.ones(2))
    for make in (lambda: jc.metrics.auc("micro"), lambda: jc.metrics.calibration_error(0)):
        with pytest.raises(ValueError):
            make()
