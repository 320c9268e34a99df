"""Training of the small models, enough of it for an honest figure in a minute or two."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.progress import track


def train(
    apply: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    images: Any,
    labels: Any,
    epochs: int,
    batch: int = 128,
    rate: float = 2e-3,
    decay: float = 1e-2,
    seed: int = 0,
) -> Any:
    """Fits ``apply(params, images)``, logits, by AdamW under a cosine schedule.

    Args:
        apply: The function.
        params: Where to start.
        images: Bytes, (count, ...).
        labels: (count,).
        epochs: How often each image is seen.
        batch: Images per step.
        rate: The highest learning rate.
        decay: Of weights.
        seed: Of the order of images.
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels, jnp.int32)
    steps = len(labels) // batch
    tx = optax.adamw(optax.cosine_decay_schedule(rate, epochs * steps), weight_decay=decay)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

    @jax.jit
    def step(params, state, rows):
        grads = jax.grad(loss)(params, images[rows], labels[rows])
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    keys = jax.random.split(jax.random.key(seed), epochs)
    for key in track(keys, "training, epochs", transient=True):
        order = jax.random.permutation(key, len(labels))
        for i in range(steps):
            params, state = step(params, state, order[i * batch : (i + 1) * batch])
        # Steps are dispatched ahead of their results: without waiting, progress would be a lie.
        jax.block_until_ready(params)
    return params


def batches(images: Any, labels: Any, size: int = 1000) -> list[tuple[Any, Any]]:
    """Pairs of arrays for `jaxopt_compress.evaluate`."""
    images, labels = jnp.asarray(images), jnp.asarray(labels, jnp.int32)
    starts = range(0, len(labels), size)
    return [(images[i : i + size], labels[i : i + size]) for i in starts]


def scaled(key: jax.Array, *shape: int, gain: float = 2.0) -> jax.Array:
    """A random kernel of variance ``gain / fan_in``; the last axis is the output (He et al., 2015)."""
    fan_in = jnp.prod(jnp.asarray(shape[:-1]))
    return jax.random.normal(key, shape) * jnp.sqrt(gain / fan_in)
