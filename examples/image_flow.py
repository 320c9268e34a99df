"""Image classification, from training to a compressed checkpoint that a fresh process measures.

A CNN of convolutions of 32 and 64 and a layer of 64, with augmentation and dropout, on
Fashion-MNIST; or on CIFAR-10 in the "binary version" for C programs, whose folder is given. Each
variant is trained on through its own view, by labels and by the logits of the float32 network;
float32 trains on for as long.

    python -m examples.image_flow --store out                    # 6400 images, some minutes
    python -m examples.image_flow --store out --images 60000     # all of them: an hour
    python -m examples.image_flow --cifar10 cifar-10-batches-bin
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxopt_compress as jc
from examples import flow
from examples.data import fashion_mnist
from examples.models.common import dense
from examples.models.lenet import halved
from examples.models.training import batches, scaled, train

WEIGHTS, BATCH, TEMPERATURE = "**/kernel", 128, 4.0
# The first and the last layer hold one percent of the weights, and most of the sensitivity.
LARGE = ["conv2/kernel", "dense/kernel"]


def cifar10(folder):
    """((50000, 32, 32, 3) uint8, (50000,) uint8) to train with, and 10000 of each to test with.

    References:
        Krizhevsky, 2009, Learning Multiple Layers of Features from Tiny Images.
    """

    def read(*names):
        rows = np.concatenate([np.fromfile(folder / n, np.uint8).reshape(-1, 3073) for n in names])
        return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]

    return read(*(f"data_batch_{i}.bin" for i in range(1, 6))), read("test_batch.bin")


def init(key, size=28, channels=1):
    """Parameters for images of size by size; 220,234 for those of Fashion-MNIST."""
    keys = jax.random.split(key, 4)
    shapes = {"conv1": (3, 3, channels, 32), "conv2": (3, 3, 32, 64)}
    shapes |= {"dense": ((size // 4) ** 2 * 64, 64), "head": (64, 10)}
    return {
        name: {"kernel": scaled(k, *shape), "bias": jnp.zeros(shape[-1])}
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def apply(params, images, drop=lambda x: x):
    """Logits, (n, 10), of images, bytes (n, size, size, channels)."""
    x = images / jnp.float32(255)
    for name in ("conv1", "conv2"):
        dims = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(
            x, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=dims
        )
        x = halved(jax.nn.relu(x + params[name]["bias"]))
    x = jax.nn.relu(dense(params["dense"], drop(x.reshape(x.shape[0], -1))))
    return dense(params["head"], drop(x))


def augmented(key, images):
    """Images moved by up to two pixels either way, every other one mirrored."""
    shift_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(shift_key, (len(images), 2), 0, 5)
    padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    cut = jax.vmap(lambda image, at: lax.dynamic_slice(image, (*at, 0), images.shape[1:]))
    flip = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    moved = cut(padded, corners)
    return jnp.where(flip, moved[:, :, ::-1], moved)


def objective(params, aside, images, labels, share=0.25):
    """The mean loss of augmented images with dropout; ``aside`` is a key and a teacher or None."""
    (key, teacher), count = aside, iter(range(1, 9))
    key, own = jax.random.split(key)
    images = augmented(own, images)

    def drop(x):
        kept = jax.random.bernoulli(jax.random.fold_in(own, next(count)), 1 - share, x.shape)
        return jnp.where(kept, x / (1 - share), 0)

    logits = apply(params, images, drop)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if teacher is not None:
        soft = jc.distillation.soft_targets(logits, apply(teacher, images), TEMPERATURE)
        losses = (losses + soft) / 2
    return losses.mean(), (key, teacher)


def variants():
    """How to compress: weights rounded in training, pruned, of low rank, and chains of these."""
    sparse = functools.partial(flow.sparse, where=LARGE)
    rounded = lambda bits: jc.quantize(bits, where=WEIGHTS)
    edges = jc.quantize("int8")
    mixed = lambda inner: jc.chain({tuple(LARGE): inner, WEIGHTS: edges})
    return {
        "int8": lambda steps: rounded("int8"),
        "int4": lambda steps: rounded("int4"),
        "int2, edges int8": lambda steps: mixed(jc.quantize("int2")),
        "90% pruned": lambda steps: sparse(0.9, steps),
        "90% pruned, int8": lambda steps: jc.chain(sparse(0.9, steps), rounded("int8")),
        "95% pruned, int4": lambda steps: jc.chain(sparse(0.95, steps), rounded("int4")),
        "int4, averaged ranges": lambda steps: jc.quantize(
            "int4", where=WEIGHTS, bounds=jc.bounds.moving_average(0.9)
        ),
        "CP of conv2, int8": lambda steps: jc.chain(
            jc.cp(ratio=4.0, where="conv2/kernel"), rounded("int8")
        ),
        "Tucker of conv2, int8": lambda steps: jc.chain(
            jc.tucker(ratio=4.0, where="conv2/kernel"), rounded("int8")
        ),
        "rank 8, int8": lambda steps: jc.chain(jc.low_rank(rank=8, where=LARGE), rounded("int8")),
    }


def load(args):
    """Images, bytes (n, size, size, channels), and labels: to train with, and to test with."""
    data = cifar10(args.cifar10) if args.cifar10 else fashion_mnist()
    data = [(x if x.ndim == 4 else x[..., None], y) for x, y in data]
    sizes = args.images, args.test_images
    return [(x[:n], y[:n]) for (x, y), n in zip(data, sizes, strict=True)]


def main(argv=None):
    """Trains, compresses in several ways, and compares."""
    parser = flow.arguments(__doc__, epochs=4, tune=2)
    parser.add_argument("--cifar10", type=Path, help="the folder of its binary version")
    parser.add_argument("--images", type=int, default=6400, help="to train with")
    parser.add_argument("--test-images", type=int, default=10000, help="to measure")
    args = parser.parse_args(argv)
    (images, labels), held_out = load(args)
    test, metrics = batches(*held_out), ["accuracy", "f1_macro"]
    if args.checkpoint:
        found = jc.evaluate(apply, jc.load(args.checkpoint), test, metrics)
        print(json.dumps(found))
        return found

    def fit(params, epochs, rate, teacher, compression=None, uses=None):
        aside = jax.random.key(1), teacher
        return train(
            objective,
            params,
            images,
            labels,
            epochs,
            aside,
            batch=BATCH,
            rate=rate,
            compression=compression,
            uses=uses,
            **flow.of_training(args),
        )[0]

    start = init(jax.random.key(0), *images.shape[2:])
    params = fit(start, args.epochs, 2e-3, None)
    tune = functools.partial(fit, params, args.tune, 1e-3, params)
    task = flow.Task(apply, params, test, metrics, tune, args.tune * (len(labels) // BATCH))
    made = flow.chosen(parser, variants(), args.variants)
    title = f"{'CIFAR-10' if args.cifar10 else 'Fashion-MNIST'}, {len(held_out[1])} test images"
    same = ["--test-images", str(args.test_images)]
    same += [*(["--cifar10", str(args.cifar10)] if args.cifar10 else [])]
    return flow.finish("examples.image_flow", title, task, made, args, *same)


if __name__ == "__main__":
    main()
