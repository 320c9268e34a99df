"""Training of the small models, enough of it for an honest figure in a minute or two."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track

import jaxopt_compress as jc


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
    compression: jc.Compression | None = None,
    uses: Any = None,
    stats: Any = None,
    penalty: float = 0.0,
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation] | None = None,
    log: Path | None = None,
    accumulate: int = 1,
) -> tuple[Any, Any]:
    """Trains by AdamW under a cosine schedule.

    Args:
        objective: ``objective(params, averages, images, labels) -> (loss, averages)``.
        params: Where to start.
        images: Bytes, (count, ...); or any inputs, also a tree of arrays.
        labels: (count,); or any targets, also a tree of arrays.
        epochs: How often each image is seen.
        averages: What is not trained but follows, such as those of batch norms, or a random key.
        batch: Images per step.
        rate: The highest learning rate.
        decay: Of weights.
        seed: Of the order of images.
        compression: Trains through the view of it, where gradients know what rounding does.
        uses: For the compression.
        stats: Likewise.
        penalty: The weight of the compression's penalty.
        optimizer: In the place of AdamW, from the learning rate.
        log: A file that gets a line of JSON after each epoch: sparsity, ranges, errors and clipping
            of the compressed parameters.
        accumulate: Batches whose gradients are averaged for one step.

    Returns:
        Parameters and averages. With a compression, the parameters are in their stored form.
    """
    data = jax.tree.map(_as_array, (images, labels))
    count = len(jax.tree.leaves(data)[0])
    steps = count // batch
    cosine = optax.cosine_decay_schedule(rate, epochs * steps // accumulate)
    tx = optimizer(cosine) if optimizer else optax.adamw(cosine, weight_decay=decay)
    view = lambda params, state: params
    if compression is not None:
        tx = jc.compressed_training(tx, compression, uses=uses, stats=stats, penalty=penalty)
        # Lifted, since a view may hold weights that round what they meet.
        objective, view = jc.lift(objective), compression.view

    if accumulate > 1:
        tx = optax.MultiSteps(tx, accumulate)

    @jax.jit
    def step(params, averages, state, data, rows):
        images, labels = jax.tree.map(lambda x: x[rows], data)
        grad = jax.grad(objective, has_aux=True)
        grads, averages = grad(view(params, state), averages, images, labels)
        if accumulate > 1:  # Sums of gradients want one array per parameter.
            grads = jc.weight_gradients(grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), averages, state

    now = (params, averages, tx.init(params))
    keys = jax.random.split(jax.random.key(seed), epochs)
    for key in track(keys, "training, epochs", console=Console(stderr=True), transient=True):
        order = jax.random.permutation(key, count)
        for i in range(steps):
            now = step(*now, data, order[i * batch : (i + 1) * batch])
        # Steps are dispatched ahead of their results: without waiting, progress would be a lie.
        jax.block_until_ready(now)
        if log and compression is not None:
            with log.open("a") as file:
                print(json.dumps(jax.tree.map(float, jc.scalars(now[2], now[0]))), file=file)
    params, averages, state = now
    if compression is not None:
        params = jc.compress(params, compression, state=state)
    return params, averages


def _as_array(x: Any) -> jax.Array:
    """Labels of few bits would not do for a loss; images stay bytes."""
    x = np.asarray(x)
    return jnp.asarray(x, jnp.int32 if x.ndim == 1 and x.dtype.kind in "iu" else None)


def batches(images: Any, labels: Any, size: int = 1000) -> list[tuple[Any, Any]]:
    """Pairs of arrays for `jaxopt_compress.evaluate`."""
    images, labels = jnp.asarray(images), jnp.asarray(labels, jnp.int32)
    starts = range(0, len(labels), size)
    return [(images[i : i + size], labels[i : i + size]) for i in starts]


def scaled(key: jax.Array, *shape: int, gain: float = 2.0) -> jax.Array:
    """A random kernel of variance ``gain / fan_in``, the output axis last (He et al., 2015)."""
    return jax.random.normal(key, shape) * math.sqrt(gain / math.prod(shape[:-1]))
