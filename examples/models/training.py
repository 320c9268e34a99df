"""Training of the small models, enough of it for an honest figure in a minute or two."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.progress import track


def cross_entropy(apply: Callable[[Any, Any], jax.Array]) -> Callable[..., tuple[jax.Array, Any]]:
    """The objective of a function without running averages, for `train`."""

    def objective(params, averages, images, labels):
        losses = optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels)
        return losses.mean(), averages

    return objective


def train(
    objective: Callable[[Any, Any, Any, Any], tuple[jax.Array, Any]],
    params: Any,
    images: Any,
    labels: Any,
    epochs: int,
    averages: Any = None,
    batch: int = 128,
    rate: float = 2e-3,
    decay: float = 1e-2,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Trains by AdamW under a cosine schedule.

    Args:
        objective: ``objective(params, averages, images, labels) -> (loss, averages)``.
        params: Where to start.
        images: Bytes, (count, ...).
        labels: (count,).
        epochs: How often each image is seen.
        averages: What is not trained but follows, such as those of batch norms.
        batch: Images per step.
        rate: The highest learning rate.
        decay: Of weights.
        seed: Of the order of images.

    Returns:
        Parameters and averages.
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels, jnp.int32)
    steps = len(labels) // batch
    tx = optax.adamw(optax.cosine_decay_schedule(rate, epochs * steps), weight_decay=decay)

    @jax.jit
    def step(params, averages, state, rows):
        grad = jax.grad(objective, has_aux=True)
        grads, averages = grad(params, averages, images[rows], labels[rows])
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), averages, state

    now = (params, averages, tx.init(params))
    keys = jax.random.split(jax.random.key(seed), epochs)
    for key in track(keys, "training, epochs", transient=True):
        order = jax.random.permutation(key, len(labels))
        for i in range(steps):
            now = step(*now, order[i * batch : (i + 1) * batch])
        # Steps are dispatched ahead of their results: without waiting, progress would be a lie.
        jax.block_until_ready(now)
    return now[:2]


def batches(images: Any, labels: Any, size: int = 1000) -> list[tuple[Any, Any]]:
    """Pairs of arrays for `jaxopt_compress.evaluate`."""
    images, labels = jnp.asarray(images), jnp.asarray(labels, jnp.int32)
    starts = range(0, len(labels), size)
    return [(images[i : i + size], labels[i : i + size]) for i in starts]


def scaled(key: jax.Array, *shape: int, gain: float = 2.0) -> jax.Array:
    """A random kernel of variance ``gain / fan_in``, the output axis last (He et al., 2015)."""
    return jax.random.normal(key, shape) * math.sqrt(gain / math.prod(shape[:-1]))
