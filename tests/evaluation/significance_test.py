"""Tests of paired differences against scipy, and their parts in comparisons."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jaxopt_compress as jc
from jaxopt_compress.evaluation.ranks import area
from jaxopt_compress.evaluation.relations import _cosine
from jaxopt_compress.evaluation.significance import bootstrap, mcnemar, paired_test, sign_test


@pytest.mark.parametrize("split", [(0, 0), (1, 7), (30, 30), (400, 470)])
def test_changed_answers_have_the_probability_of_scipy(split):
    want = scipy.stats.binomtest(min(split), sum(split)).pvalue if sum(split) else 1.0
    assert mcnemar(*split) == pytest.approx(want, rel=1e-9)


def test_random_signs_have_the_probability_of_scipy():
    moved = np.random.default_rng(0).normal(0.25, 1, 60)
    want = scipy.stats.permutation_test(
        (moved,), np.sum, permutation_type="samples", n_resamples=20_000, rng=1
    ).pvalue
    # Four standard errors of 2000 draws.
    assert abs(sign_test(moved) - want) < 4 * np.sqrt(want / 2000)
    many = np.random.default_rng(0).normal(0.01, 1, 30_000)
    assert sign_test(many) == pytest.approx(scipy.stats.ttest_1samp(many, 0).pvalue, rel=0.02)


def test_intervals_are_those_of_scipy():
    rng = np.random.default_rng(0)
    for n in (200, 30_000):
        moved, weights = rng.normal(0.1, 1, n), rng.integers(1, 3, n).astype(float)
        low, high = bootstrap(moved, weights)
        mean = lambda m, w, axis=-1: m.sum(axis) / w.sum(axis)
        want = scipy.stats.bootstrap(
            (moved, weights), mean, paired=True, vectorized=True, n_resamples=300, method="basic"
        )
        sigma = want.standard_error
        centre = mean(moved, weights)
        # Ends of 300 and of 1000 resamples are some tenths of a standard error apart.
        np.testing.assert_allclose([low, high], [centre - 1.96 * sigma, centre + 1.96 * sigma],
                                   atol=0.45 * sigma)  # fmt: skip


def test_examples_without_weight_change_nothing():
    kept = lambda sums, weights: {"sums": np.array(sums), "weights": np.array(weights)}
    found = paired_test(kept([1, 1, 1, 9.0], [1, 1, 1, 0]), kept([0, 1, 0, 0.0], [1, 1, 1, 0]))
    assert found["test"] == "McNemar" and found["p"] == 0.5 and found["noise"]
    assert found["difference"] == pytest.approx(-2 / 3)


def model(params, images):
    x = jnp.tanh(images.reshape(len(images), -1) / 255.0 @ params["in"])
    return x @ params["out"]


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    new = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"in": new(16, 32), "out": new(32, 4)}
    images = jnp.asarray(rng.integers(0, 256, (40, 4, 4)), jnp.uint8)
    targets = jnp.asarray(rng.integers(0, 4, 40))
    return params, jc.compress(params, jc.quantize("int2"), layout="in,out"), images, targets


@pytest.mark.ci
def test_comparisons_hold_tests_attributions_membership_and_layers(case):
    params, small, images, targets = case
    batches = [(images[:20], targets[:20]), (images[20:], targets[20:])]
    members = [(images[:20], model(params, images[:20]).argmax(-1))]
    found = jc.compare(
        model,
        {"a": params, "b": small},
        batches,
        ["accuracy", "cross_entropy", "per_class"],
        rounds=1,
        corruptions={"noise": jc.corruptions.noise(30.0)},
        key=jax.random.key(0),
        attribution=True,
        members=members,
        stats=jc.calibrate(model, params, [images]),
    )
    a, b = found["a"], found["b"]
    assert "paired" not in a and set(b["paired"]) == {"accuracy", "cross_entropy"}
    for metric in b["paired"]:
        assert b["paired"][metric]["difference"] == pytest.approx(b[metric] - a[metric], rel=1e-4)
    dense = jc.materialize(small)
    score = lambda p, x, c: jnp.sum(jnp.take_along_axis(model(p, x), c[:, None], 1))
    picked, x = model(params, images).argmax(-1), images.astype("f4")
    g, h = (np.asarray(jax.grad(score, 1)(p, x, picked)).reshape(40, -1) for p in (params, dense))
    cosine = (g * h).sum(1) / np.linalg.norm(g, axis=1) / np.linalg.norm(h, axis=1)
    assert b["attribution_cosine"] == pytest.approx(cosine.mean(), rel=1e-4)
    ranks = [scipy.stats.spearmanr(u, v).statistic for u, v in zip(g, h, strict=True)]
    assert b["attribution_rank"] == pytest.approx(np.mean(ranks), rel=1e-3)
    assert a["attribution_cosine"] == pytest.approx(1, abs=1e-5)
    losses = lambda p, x, y: -np.asarray(jax.nn.log_softmax(model(p, x)))[np.arange(len(y)), y]
    inside, outside = losses(dense, *members[0]), losses(dense, images, targets)
    # Members are among the others too: losses that differ by rounding only are one example's.
    above = outside - inside[:, None]
    wins = np.where(np.abs(above) < 1e-5, 0.5, above > 0)
    assert b["membership_auc"] == pytest.approx(wins.mean(), abs=1e-6)
    assert a["membership_auc"] > 0.5
    assert a["layers"] == {"in": 0, "out": 0} and all(b["layers"][k] > 0.01 for k in b["layers"])
    assert b["peak_bytes"] > 0 and b["compile_seconds"] > 0
    median = b["milliseconds"]["median"]
    assert b["examples_per_second"] == pytest.approx(20e3 / median)
    assert b["moved_bytes"] == jc.nbytes(small) + 20 * 16 + 20 * 4 * 4
    operations = 20 * (16 * 32 + 32 * 4) * 4.6
    assert b["microjoules"] == pytest.approx((operations + b["moved_bytes"] * 162.5) / 1e6)
    assert 0 <= b["noise/accuracy"] <= 1 and len(b["per_class"]["f1"]) == 4


def test_attributions_of_any_size_are_compared():
    x = jnp.array([[1.0, 2.0], [3.0, -1.0], [0.0, 0.0]])
    y = jnp.array([[2.0, 1.0], [3.0, -1.0], [0.0, 1.0]])
    for scale in (1.0, 1e-30, 1e30):
        np.testing.assert_allclose(_cosine(x * scale, y), [0.8, 1.0, 0.0], rtol=1e-6)


def test_areas_have_no_value_without_both_kinds():
    assert np.isnan(area(np.ones(3), np.ones(3, bool), np.ones(3)))
