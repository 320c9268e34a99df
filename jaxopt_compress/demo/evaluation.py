"""What is measured of a network: quality, size and speed."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.demo.data import CLASSES, Split

Logits = Callable[[Any, jax.Array], jax.Array]


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The mean over classes of ``2 TP / (2 TP + FP + FN)``.

    Example:
        >>> macro_f1(np.arange(10), np.arange(10))
        1.0
    """
    hits, found, there = (
        np.bincount(x, minlength=CLASSES) for x in (labels[predicted == labels], predicted, labels)
    )
    return float(np.mean(2 * hits / np.maximum(found + there, 1)))


def quality(logits: jax.Array, dense: jax.Array, data: Split) -> dict[str, float]:
    """Accuracy, macro-F1, and how often the choice is that of the dense network.

    Args:
        logits: Of shape (n, classes).
        dense: Those of the dense network.
        data: The images and their labels.
    """
    predicted, reference = (np.asarray(jnp.argmax(x, axis=-1)) for x in (logits, dense))
    labels = np.asarray(data.labels)
    return {
        "accuracy": float(np.mean(predicted == labels)),
        "macro_f1": macro_f1(predicted, labels),
        "agreement": float(np.mean(predicted == reference)),
    }


def file_bytes(folder: Path) -> int:
    """The sizes of all files of a checkpoint, its description included."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def milliseconds(
    logits: Logits, trees: Mapping[str, Any], images: jax.Array, rounds: int = 21
) -> dict[str, float]:
    """Median time of a compiled call for each tree, in rounds that take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in trees}
    for _ in range(rounds):
        for name, tree in trees.items():
            begin = time.perf_counter()
            logits(tree, images).block_until_ready()
            seconds[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def same_bits(a: jax.Array, b: jax.Array) -> bool:
    """Whether two arrays are equal, bit for bit."""
    x, y = np.asarray(a), np.asarray(b)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
