"""LeNet-300-100 and LeNet-5, the networks of the pruning papers, and a small MLP, on MNIST.

Trains the first two, and prints their accuracy on the 10000 test images with float32 and int8
weights.

    python -m examples.models.lenet

References:
    LeCun et al., 1998, Gradient-Based Learning Applied to Document Recognition.
    Han et al., 2015, Learning both Weights and Connections for Efficient Neural Networks.
"""

import jax
import jax.numpy as jnp
from jax import lax

from examples.data import mnist
from examples.models.common import dense, show
from examples.models.training import batches, cross_entropy, scaled, train

WEIGHTS = "**/kernel"


def init_300_100(key):
    """Parameters of layers of 300, 100 and 10, 266,610 in all."""
    widths = (784, 300, 100, 10)
    keys = jax.random.split(key, 3)
    names = ("dense1", "dense2", "head")
    return {
        name: {"kernel": scaled(k, a, b), "bias": jnp.zeros(b)}
        for name, k, a, b in zip(names, keys, widths, widths[1:], strict=False)
    }


def apply_300_100(params, images):
    """Logits, (n, 10), of images, bytes (n, 28, 28)."""
    x = images.reshape(images.shape[0], -1).astype(params["dense1"]["kernel"].dtype) / 255
    x = jax.nn.relu(dense(params["dense1"], x))
    x = jax.nn.relu(dense(params["dense2"], x))
    return dense(params["head"], x)


def init_5(key):
    """Parameters of convolutions of 20 and 50 and layers of 500 and 10, 431,080 in all."""
    shapes = {"conv1": (5, 5, 1, 20), "conv2": (5, 5, 20, 50), "dense1": (800, 500)}
    shapes["head"] = (500, 10)
    keys = jax.random.split(key, len(shapes))
    return {
        name: {"kernel": scaled(k, *shape), "bias": jnp.zeros(shape[-1])}
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def apply_5(params, images):
    """Logits, (n, 10), of images, bytes (n, 28, 28); the form of Caffe and of the papers."""
    x = images[..., None] / jnp.float32(255)
    for name in ("conv1", "conv2"):
        dims = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(
            x, params[name]["kernel"], (1, 1), "VALID", dimension_numbers=dims
        )
        x = halved(x + params[name]["bias"])
    x = jax.nn.relu(dense(params["dense1"], x.reshape(x.shape[0], -1)))
    return dense(params["head"], x)


def products_5(params, images):
    """As `apply_5`, by products with patches: with few channels, faster to train on a CPU."""
    x = images[..., None] / jnp.float32(255)
    for name in ("conv1", "conv2"):
        kernel, side = params[name]["kernel"], x.shape[1] - 4
        moved = [x[:, i : i + side, j : j + side] for i in range(5) for j in range(5)]
        kernel = kernel.reshape(-1, kernel.shape[-1])
        x = halved(jnp.concatenate(moved, -1) @ kernel + params[name]["bias"])
    x = jax.nn.relu(dense(params["dense1"], x.reshape(x.shape[0], -1)))
    return dense(params["head"], x)


def halved(x):
    """The largest of each two by two pixels."""
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))


def init_128(key):
    """Parameters of layers of 128 and 10, 101,770 in all."""
    keys = jax.random.split(key)
    return {
        "dense1": {"kernel": scaled(keys[0], 784, 128), "bias": jnp.zeros(128)},
        "head": {"kernel": scaled(keys[1], 128, 10), "bias": jnp.zeros(10)},
    }


def apply_128(params, images):
    """Logits, (n, 10), of images, bytes (n, 28, 28)."""
    x = images.reshape(images.shape[0], -1) / jnp.float32(255)
    return dense(params["head"], jax.nn.relu(dense(params["dense1"], x)))


def dropped_128(params, images, key):
    """As `apply_128`, in training: a fifth of the hidden units is left out."""
    x = images.reshape(images.shape[0], -1) / jnp.float32(255)
    x = jax.nn.relu(dense(params["dense1"], x))
    stays = jax.random.bernoulli(key, 0.8, x.shape)
    return dense(params["head"], jnp.where(stays, x / 0.8, 0))


DROPPED = {apply_128: dropped_128}
FASTER = {apply_5: products_5}
MODELS = {"LeNet-300-100": (init_300_100, apply_300_100), "LeNet-5": (init_5, apply_5)}


def main(epochs=6):
    """Trains both and compares float32 and int8."""
    training, test = mnist()
    found = {}
    for name, (init, apply) in MODELS.items():
        params, _ = train(cross_entropy(apply), init(jax.random.key(0)), *training, epochs)
        title = f"{name}: the 10000 test images of MNIST"
        found[name] = show(title, apply, params, batches(*test), ["accuracy", "f1_macro"], WEIGHTS)
    return found


if __name__ == "__main__":
    main()
