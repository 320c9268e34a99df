"""The handwritten digits that scikit-learn brings along."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.extras import require

CLASSES = 10
TEST_SIZE = 500


class Split(NamedTuple):
    """Images, float32 in [0, 1] of shape (n, 8, 8, 1), and labels, int32 of shape (n,)."""

    images: jax.Array
    labels: jax.Array


def load() -> tuple[Split, Split]:
    """The 1797 digits, split into 1297 to train on and 500 to test with.

    The split is stratified and always the same.

    References:
        Alpaydin and Kaynak, 1998, Optical Recognition of Handwritten Digits, UCI.
    """
    digits: Any = require("sklearn.datasets", extra="examples").load_digits()
    images, labels = digits["images"], digits["target"]
    split_data = require("sklearn.model_selection", extra="examples").train_test_split
    parts = split_data(images, labels, test_size=TEST_SIZE, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, parts)
    split = lambda x, y: Split(x[..., None].astype(jnp.float32) / 16, y.astype(jnp.int32))
    return split(train_images, train_labels), split(test_images, test_labels)
