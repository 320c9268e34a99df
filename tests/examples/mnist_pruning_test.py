"""The pruning example trains, stores, measures and goes on, on noise instead of its data."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import mnist_pruning, mnist_training
from examples.models.common import dense
from examples.models.training import scaled


def init(key):
    keys = jax.random.split(key)
    return {
        "first": {"kernel": scaled(keys[0], 784, 8), "bias": jnp.zeros(8)},
        "head": {"kernel": scaled(keys[1], 8, 10), "bias": jnp.zeros(10)},
    }


def apply(params, images):
    x = images.reshape(len(images), -1) / jnp.float32(255)
    return dense(params["head"], jax.nn.relu(dense(params["first"], x)))


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Runs the command; returns what it writes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 64, 28, 28), np.uint8)
    labels = rng.integers(0, 10, (2, 64), np.uint8)
    monkeypatch.setattr(mnist_pruning, "MODELS", {"LeNet-300-100": (init, apply)})
    monkeypatch.setattr(mnist_training, "BATCH", 16)
    monkeypatch.setattr(mnist_pruning, "EVERY", 2)
    monkeypatch.setattr(mnist_training, "ROUNDS", 2)
    monkeypatch.setattr(mnist_pruning, "mnist", lambda: list(zip(images, labels, strict=True)))

    def run(*arguments):
        out = tmp_path / "results.json"
        command = ["mnist_pruning", "--out", str(out), "--resume", "--json", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        mnist_pruning.main()
        return json.loads(out.read_text())

    return run


@pytest.mark.ci
@pytest.mark.fast("rigl")
@pytest.mark.parametrize("method", ["gradual", "global", "rigl", "set", "tickets"])
def test_runs_and_goes_on(results, method):
    common = ("--epochs", "3", "--sparsities", "0.9", "--methods")
    first = results("--seeds", "0", *common, method)
    assert [row["seed"] for row in first] == [0]
    both = results("--seeds", "0", "1", *common, method)
    assert both[0] == first[0] and [row["seed"] for row in both] == [0, 1]
    size = 784 * 8 + 8 * 10
    kept = size - int(np.floor(0.9 * size + 0.5))
    for row in both:
        # Values, positions and biases. Layers round their shares, and the small one has a byte of
        # positions for up to eight of its values.
        positions = row["bytes"] - 4 * kept - 4 * 18
        assert kept - 80 <= positions <= size / 8 + 8
        assert 0 <= row["f1_macro"] <= 1


@pytest.mark.slow
def test_learned_sparsity_runs(results):
    """Too short to prune: every entry is there, and training has moved gates and noise."""
    for method in ("l0", "variational"):
        (row,) = results("--seeds", "0", "--epochs", "1", "--methods", method)[-1:]
        assert row["method"] == method and 0 <= row["zeros"] <= 1
