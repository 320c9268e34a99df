"""The handwritten digits that scikit-learn brings along."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    images, labels = digits["images"], digits["target"]
    parts = train_test_split(images, labels, test_size=TEST_SIZE, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, parts)
    split = lambda x, y: Split(x[..., None].astype(jnp.float32) / 16, y.astype(jnp.int32))
    return split(train_images, train_labels), split(test_images, test_labels)
