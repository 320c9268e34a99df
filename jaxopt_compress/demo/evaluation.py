"""What is measured of a network: quality, size and speed."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.demo.data import Split
from jaxopt_compress.evaluation import evaluate
from jaxopt_compress.evaluation.timing import interleave, median

Logits = Callable[[Any, jax.Array], jax.Array]


def quality(logits: jax.Array, dense: jax.Array, data: Split) -> dict[str, float]:
    """Accuracy, macro-F1, and how often the choice is that of the dense network.

    Args:
        logits: Scores, (n, classes).
        dense: Those of the dense network.
        data: The images and their labels.
    """
    found = evaluate(_as_they_are, None, [(logits, data.labels)], ["accuracy", "f1_macro"])
    chosen = jnp.argmax(dense, axis=-1)
    same = evaluate(_as_they_are, None, [(logits, chosen)], ["accuracy"])
    return {
        "accuracy": found["accuracy"],
        "macro_f1": found["f1_macro"],
        "agreement": same["accuracy"],
    }


def _as_they_are(params: None, logits: jax.Array) -> jax.Array:
    del params
    return logits


def file_bytes(folder: Path) -> int:
    """The sizes of all files of a checkpoint, its description included."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def milliseconds(
    logits: Logits, trees: Mapping[str, Any], images: jax.Array, rounds: int = 21
) -> dict[str, float]:
    """Median time of a compiled call for each tree, in rounds that take turns."""
    calls = {name: functools.partial(logits, tree, images) for name, tree in trees.items()}
    samples = interleave(calls, rounds)
    return {name: 1e3 * median(each.wall).median for name, each in samples.items()}


def same_bits(a: jax.Array, b: jax.Array) -> bool:
    """Whether two arrays are equal, bit for bit."""
    x, y = np.asarray(a), np.asarray(b)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
