"""A small vision transformer, 205k weights.

Trains it on Fashion-MNIST, and prints its accuracy on the 10000 test images with float32 and int8
weights.

    python -m examples.models.vit

References:
    Dosovitskiy et al., 2021, An Image is Worth 16x16 Words.
"""

import math

import jax
import jax.numpy as jnp

from examples.data import fashion_mnist
from examples.models.common import attention, dense, layer_norm, run_layers, show
from examples.models.training import batches, cross_entropy, scaled, train

WEIGHTS = "**/kernel"
PATCH, HEADS, EPSILON = 7, 4, 1e-6


def init(key, width=64, depth=4, size=28, classes=10):
    """Parameters, one tree per layer; `examples.models.common.stack` makes one of them."""
    *keys, patch_key, place_key, head_key = jax.random.split(key, depth + 3)
    norm = lambda: {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    def linear(key, *shape):
        return {"kernel": scaled(key, *shape, gain=1.0), "bias": jnp.zeros(shape[-1])}

    def layer(key):
        keys = jax.random.split(key, 6)
        names = ("query", "key", "value", "output")
        made = {name: linear(k, width, width) for name, k in zip(names, keys, strict=False)}
        mlp = {"up": linear(keys[4], width, 4 * width), "down": linear(keys[5], 4 * width, width)}
        return {"attention": made | {"norm": norm()}, "mlp": mlp | {"norm": norm()}}

    places = (size // PATCH) ** 2
    return {
        "patches": linear(patch_key, PATCH**2, width),
        "position": {"embedding": 0.02 * jax.random.normal(place_key, (places, width))},
        "layers": [layer(key) for key in keys],
        "norm": norm(),
        "head": linear(head_key, width, classes),
    }


def apply(params, images):
    """Logits, (n, classes), of images, bytes (n, size, size)."""
    side = math.isqrt(params["position"]["embedding"].shape[0])
    x = images.reshape(-1, side, PATCH, side, PATCH).swapaxes(2, 3) / jnp.float32(255)
    x = dense(params["patches"], x.reshape(len(images), side * side, PATCH * PATCH))
    x = run_layers(block, params["layers"], x + params["position"]["embedding"])
    return dense(params["head"], layer_norm(params["norm"], x, EPSILON).mean(1))


def block(params, x):
    """One layer, with norms before its parts."""
    normed = layer_norm(params["attention"]["norm"], x, EPSILON)
    x = x + attention(params["attention"], normed, HEADS)
    hidden = dense(params["mlp"]["up"], layer_norm(params["mlp"]["norm"], x, EPSILON))
    return x + dense(params["mlp"]["down"], jax.nn.gelu(hidden))


def main(epochs=4):
    """Trains it and compares float32 and int8."""
    training, test = fashion_mnist()
    params, _ = train(cross_entropy(apply), init(jax.random.key(0)), *training, epochs)
    title = "Vision transformer: the 10000 test images of Fashion-MNIST"
    return show(title, apply, params, batches(*test), ["accuracy", "f1_macro"], WEIGHTS)


if __name__ == "__main__":
    main()
