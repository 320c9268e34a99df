"""The main job: what it writes, and that a seed gives the same table twice."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.demo import Epochs, data, run
from jaxopt_compress.demo.evaluation import same_bits
from jaxopt_compress.demo.methods import METHODS

pytestmark = pytest.mark.ci

PNG = b"\x89PNG\r\n\x1a\n"
PLOTS = ("sparsity.png", "accuracy.png", "layer_error.png")
ROW = {
    "variant": str,
    "accuracy": float,
    "macro_f1": float,
    "agreement": float,
    "one_shot_accuracy": float,
    "stored_bytes": int,
    "ratio": float,
    "bits_per_weight": float,
}


def read(out):
    document = json.loads((out / "report.json").read_text())
    timing, files = document.pop("timing"), document.pop("file_bytes")
    assert timing["device"] and timing["total_seconds"] > 0
    assert timing["median_ms_per_batch"].keys() == document["reports"].keys()
    for row in document["table"]:
        # What files hold besides the arrays is their description: some kilobytes.
        assert 0 < files[row["variant"]] - row["stored_bytes"] < 40_000
    return document


def check(out, methods):
    document = read(out)
    names = ["dense", "dense, longer", *(method.name for method in methods)]
    assert [row["variant"] for row in document["table"]] == names
    assert list(document["reports"]) == names
    for row in document["table"]:
        assert {key: type(value) for key, value in row.items()} == ROW
        assert all(0 <= row[key] <= 1 for key in ("accuracy", "macro_f1", "agreement"))
        total = document["reports"][row["variant"]]["total"]
        assert total["stored_bytes"] == row["stored_bytes"]
        assert row["bits_per_weight"] == total["bits_per_weight"]
    assert document["data"]["train"] + document["data"]["test"] == 1797
    assert document["reload"]["equal"] is True
    for plot in PLOTS:
        assert (out / plot).read_bytes().startswith(PNG)
    keys = ["dense", "dense_longer", *(method.key for method in methods)]
    for key, row in zip(keys, document["table"], strict=True):
        small = jc.load(out / "checkpoints" / key)
        assert jc.nbytes(small) == row["stored_bytes"]
    return document


def run_short(out):
    methods = [method for method in METHODS if method.key == "svd_int8"]
    run(out, seed=3, epochs=Epochs(2, 1), methods=methods)
    return check(out, methods)


def test_a_short_run_writes_everything(tmp_path):
    run_short(tmp_path)


@pytest.mark.slow
def test_a_seed_gives_the_same_table_twice(tmp_path):
    assert run_short(tmp_path / "first") == run_short(tmp_path / "second")


@pytest.mark.slow
def test_the_main_job(tmp_path):
    run(tmp_path)
    dense, _, *others = check(tmp_path, METHODS)["table"]
    assert len(others) == 5
    # The test images are 500: the standard error of these accuracies is about 0.6%.
    assert dense["accuracy"] > 0.97
    for row in others:
        assert row["accuracy"] > 0.95
        assert row["agreement"] > 0.95
        assert row["ratio"] > 5


def test_the_split_is_stratified():
    train, test = data.load()
    assert test.images.shape == (500, 8, 8, 1) and float(jnp.max(test.images)) == 1.0
    counts = [np.bincount(part.labels) / len(part.labels) for part in (train, test)]
    np.testing.assert_allclose(*counts, atol=2e-3)


def test_same_bits_tells_zeros_apart():
    assert same_bits(jnp.zeros(3), jnp.zeros(3))
    assert not same_bits(jnp.zeros(3), -jnp.zeros(3))
