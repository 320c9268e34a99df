"""The network, and the loop that trains it, plain or through its compressed view."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jaxopt_compress as jc
from jaxopt_compress.demo.data import CLASSES, Split
from jaxopt_compress.typing import PyTree

BATCH = 64


class Epochs(NamedTuple):
    """How often the training images are seen, by the dense network and by each compressed one."""

    dense: int = 20
    compressed: int = 20


DEFAULT = Epochs()


class CNN(nn.Module):
    """Two convolutions and two dense layers, 151,306 parameters; (n, 8, 8, 1) to (n, 10)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images."""
        x = nn.relu(nn.Conv(32, (3, 3), name="conv1")(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=(2, 2), name="conv2")(x))
        x = nn.relu(nn.Dense(128, name="hidden")(x.reshape(x.shape[0], -1)))
        return nn.Dense(CLASSES, name="logits")(x)


class Trained(NamedTuple):
    """What training gives.

    Attributes:
        params: The parameters that the optimizer has updated.
        opt_state: Its state, with that of the compression.
        loss: One value per step, of shape (steps,).
        sparsity: The share of zeros in the kernels of the view, likewise.
    """

    params: PyTree
    opt_state: PyTree
    loss: np.ndarray
    sparsity: np.ndarray


def steps_of(data: Split, epochs: int) -> int:
    """How many whole batches there are."""
    return epochs * (len(data.labels) // BATCH)


def train(
    model: nn.Module,
    params: PyTree,
    tx: optax.GradientTransformation,
    data: Split,
    key: jax.Array,
    epochs: int,
    compression: jc.Compression | None = None,
    on_epoch: Callable[[], Any] = lambda: None,
) -> Trained:
    """Trains on random batches.

    Args:
        model: The network.
        params: Where to start.
        tx: The optimizer; with a compression, one made by `compressed_training`.
        data: The training images.
        key: Decides the batches.
        epochs: How often each image is seen.
        compression: Whose view the loss is taken at.
        on_epoch: Called after each epoch.
    """

    def loss(params: PyTree, batch: Split) -> jax.Array:
        logits = model.apply(params, batch.images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()  # pyright: ignore

    # Not a scan over the steps: XLA's convolutions on CPU are some fifty times slower in a loop.
    @jax.jit
    def step(params: PyTree, opt_state: PyTree, rows: jax.Array):
        view = params if compression is None else compression.view(params, opt_state)
        value, grads = jax.value_and_grad(loss)(view, jax.tree.map(lambda x: x[rows], data))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value, _sparsity(view)

    opt_state = tx.init(params)
    losses, sparsities = [], []
    for epoch_key in jax.random.split(key, epochs):
        order = jax.random.permutation(epoch_key, len(data.labels))
        for rows in order[: steps_of(data, 1) * BATCH].reshape(-1, BATCH):
            params, opt_state, value, sparsity = step(params, opt_state, rows)
            losses.append(value)
            sparsities.append(sparsity)
        # Steps are dispatched ahead of their results: without waiting, progress would be a lie.
        jax.block_until_ready(params)
        on_epoch()
    return Trained(params, opt_state, np.array(losses), np.array(sparsities))


def _sparsity(params: PyTree) -> jax.Array:
    kernels = [w for w in jax.tree.leaves(params) if w.ndim > 1]
    return sum(jnp.sum(w == 0) for w in kernels) / sum(w.size for w in kernels)  # pyright: ignore
