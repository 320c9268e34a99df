"""A small ResNet with batch norms, 145k weights, in flax linen.

Trains it on Fashion-MNIST, and prints its accuracy on the 10000 test images with float32 and int8
weights. `examples.fashion_mnist_qat` trains it with quantized weights and inputs.

    python -m examples.models.resnet

References:
    He et al., 2016, Deep Residual Learning for Image Recognition.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from examples.data import fashion_mnist
from examples.models.common import show
from examples.models.training import batches, train

WEIGHTS = "params/**/kernel"


class Block(nn.Module):
    """Two convolutions beside a shortcut (He et al., 2016)."""

    width: int
    strides: int

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.95)
        conv = functools.partial(nn.Conv, use_bias=False)
        y = nn.relu(norm()(conv(self.width, (3, 3), self.strides)(x)))
        y = norm()(conv(self.width, (3, 3))(y))
        if self.strides > 1 or x.shape[-1] != self.width:
            x = norm()(conv(self.width, (1, 1), self.strides, name="shortcut")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Images, (n, 28, 28, 1) in [0, 1], to the logits of ten classes."""

    blocks: tuple[tuple[int, int], ...] = ((32, 2), (64, 2), (64, 1))

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(16, (3, 3), 2, use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.95)(x))
        for width, strides in self.blocks:
            x = Block(width, strides)(x, train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


MODEL = ResNet()


def objective(params, batch_stats, images, labels):
    """The mean cross-entropy of a batch, and the new running averages of the batch norms."""
    variables = {"params": params, "batch_stats": batch_stats}
    answer, new = MODEL.apply(variables, images, True, mutable=["batch_stats"])
    losses = optax.softmax_cross_entropy_with_integer_labels(answer, labels)
    return losses.mean(), new["batch_stats"]


def logits(params, batch_stats, images):
    """What the trained network answers, (n, 10)."""
    return MODEL.apply({"params": params, "batch_stats": batch_stats}, images)


def apply(variables, images):
    """Logits, (n, 10), of images, bytes (n, 28, 28)."""
    return MODEL.apply(variables, images[..., None] / jnp.float32(255))


def trained(images, labels, epochs):
    """Variables of a network that was trained for a while."""
    variables = MODEL.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    learn = lambda params, averages, images, labels: objective(
        params, averages, images[..., None] / jnp.float32(255), labels
    )
    params, averages = train(
        learn, variables["params"], images, labels, epochs, variables["batch_stats"]
    )
    return {"params": params, "batch_stats": averages}


def main(epochs=3):
    """Trains it and compares float32 and int8."""
    training, test = fashion_mnist()
    title = "ResNet: the 10000 test images of Fashion-MNIST"
    variables = trained(*training, epochs)
    return show(title, apply, variables, batches(*test), ["accuracy", "f1_macro"], WEIGHTS)


if __name__ == "__main__":
    main()
