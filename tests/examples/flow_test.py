"""The examples of a whole flow train, store and measure, on noise instead of their data."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from examples import flow, image_flow, movielens, search, text_flow

RNG = np.random.default_rng(0)


def ratings():
    """Twenty ratings by each of thirty users."""
    rows = [
        (user, film, RNG.integers(1, 6), RNG.integers(0, 99))
        for user in range(1, 31)
        for film in RNG.choice(np.arange(1, 60), 20, replace=False)
    ]
    return np.array(rows)


def test_ratings_are_split_by_time_and_ranked_as_defined():
    rows = ratings()
    seen, held_out = movielens.split(rows)
    assert len(seen) == 16 * 30 and len(seen) + len(held_out) == len(rows)
    for user in range(1, 31):
        own = [part[part[:, 0] == user][:, 3] for part in (seen, held_out)]
        assert own[0].max() <= own[1].min()
    # An oracle for precision and recall: the right films first, then noise.
    scores = RNG.normal(size=(944, 1683)).astype(np.float32)
    batches = movielens.ranking_batches(seen, held_out, size=944)
    metrics = [jc.metrics.precision_at(10), jc.metrics.recall_at(10)]
    ranked = lambda p, users, candidates: jnp.where(candidates, p[users], -jnp.inf)
    found = jc.evaluate(ranked, jnp.asarray(scores), batches, metrics)
    precision, recall = [], []
    for user in range(1, 31):
        right = {f for u, f, r, _ in held_out if u == user and r >= 4}
        known = {f for u, f, _, _ in seen if u == user} | {0}
        order = [f for f in np.argsort(-scores[user], kind="stable") if f not in known][:10]
        if right:
            precision.append(len(right & set(order)) / 10)
            recall.append(len(right & set(order)) / len(right))
    assert found["precision@10"] == pytest.approx(np.mean(precision))
    assert found["recall@10"] == pytest.approx(np.mean(recall))


def test_words_are_the_same_rows_in_every_process():
    ids = text_flow.tokens("The cat, the CAT and 3 dogs", length=8)
    assert ids[0] == ids[2] and ids[1] == ids[3] and ids[7] == 0
    # zlib.crc32(b"the") is 0x3C456DE6.
    assert ids[0] == 1 + 0x3C456DE6 % (text_flow.ROWS - 1)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", ["gru", "transformer"])
def test_padding_does_not_matter(name):
    init, fn = text_flow.MODELS[name]
    params = init(jax.random.key(0))
    ids = RNG.integers(1, text_flow.ROWS, (3, 16)).astype(np.int32)
    ids[:, 10:] = 0
    np.testing.assert_allclose(fn(params, ids[:, :12]), fn(params, ids), rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_a_whole_flow(monkeypatch, tmp_path, capsys):
    images = RNG.integers(0, 256, (96, 28, 28), np.uint8)
    labels = RNG.integers(0, 10, 96, np.uint8)
    data = ((images[:64], labels[:64]), (images[64:], labels[64:]))
    monkeypatch.setattr(image_flow, "fashion_mnist", lambda: data)
    monkeypatch.setattr(image_flow, "BATCH", 32)
    asked = []
    # A process of its own would read the real data.
    inside = lambda module, path, *rest: (
        asked.append(path) or image_flow.main(["--checkpoint", str(path), *rest])
    )
    monkeypatch.setattr(flow, "reopened", inside)
    common = ["--epochs", "1", "--tune", "1", "--rounds", "0", "--json", "--variants", "int4"]
    plot = tmp_path / "plot.png"
    image_flow.main([*common, "--store", str(tmp_path / "out"), "--plot", str(plot)])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(rows) == ["float32", "float32, on", "int4"] and len(asked) == 3
    for row in rows.values():
        assert row["reopened"] == row["accuracy"]
    assert rows["int4"]["ratio"] > 7 and rows["float32"]["stored_bytes"] == 4 * 220234
    assert plot.stat().st_size > 0
    with pytest.raises(SystemExit):
        image_flow.main([*common[:-1], "int5"])


def test_cifar_in_its_binary_form(tmp_path):
    image = RNG.integers(0, 256, (3, 32, 32), np.uint8)
    row = np.concatenate([[7], image.reshape(-1)]).astype(np.uint8)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        row.tofile(tmp_path / name)
    (images, labels), test = image_flow.cifar10(tmp_path)
    assert images.shape == (5, 32, 32, 3) and list(labels) == [7] * 5
    np.testing.assert_array_equal(test[0][0], np.moveaxis(image, 0, -1))


@pytest.mark.ci
def test_a_search_goes_on_and_shares_its_journal(monkeypatch, tmp_path):
    optuna = pytest.importorskip("optuna")
    tried = []

    def objective(trial, parts, epochs):
        given = search.asked(trial)
        tried.append(trial.number)
        trial.set_user_attr("test", 0.0)
        if len(tried) == 2:
            raise optuna.TrialPruned()
        return given["sparsity"], float(given["width"])

    monkeypatch.setattr(search, "objective", objective)
    journal = tmp_path / "journal"
    search.work(journal, 3, 1, seed=0)
    search.work(journal, 3, 1, seed=1)
    assert tried == [0, 1, 2]
    search.work(journal, 5, 1, seed=2)
    assert tried == [0, 1, 2, 3, 4]
    rows = search.pareto(journal)
    sizes, errors = ([row[k] for row in rows] for k in ("bytes", "error"))
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)
    assert not math.isnan(errors[0])
