"""EfficientNet-Lite0: a convolutional network with depthwise convolutions, trained on ImageNet.

There are no labelled ImageNet images here, so no ImageNet accuracy. Instead a linear layer in the
place of the last one is fitted to 3000 images of Fashion-MNIST, by float32 features; printed is its
accuracy on 1000 others with float32 and with int8 weights, and how often the network as it was
trained names the same of the 1000 classes of ImageNet for them.

    python -m examples.models.efficientnet

References:
    Tan and Le, 2019, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxopt_compress as jc
from examples import data, torch_files
from examples.fetching import fetch
from examples.models.common import int8, show

WEIGHTS = "**/kernel"
EPSILON = 1e-3
# Of each stage: how many blocks, and the stride of the first one.
STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))
STRIDES = [stride if i == 0 else 1 for count, stride in STAGES for i in range(count)]
SIZE = 64
# Cross-validation on the 3000 images finds 0.3 and 1 alike, and less or more worse.
PENALTY = 0.3


def apply(params, images, strides=STRIDES):
    """Logits, (n, classes), of images, bytes (n, height, width, 3)."""
    x = (images.astype(jnp.float32) - 127) / 128
    x = jax.nn.relu6(conv(params["stem"], x, 2))
    for layers, stride in zip(params["blocks"], strides, strict=True):
        x = block(layers, x, stride)
    x = jax.nn.relu6(conv(params["top"], x)).mean((1, 2))
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def block(params, x, stride):
    """An inverted residual block: wide inside, thin outside (Sandler et al., 2018)."""
    inner = jax.nn.relu6(conv(params["expand"], x)) if "expand" in params else x
    inner = jax.nn.relu6(conv(params["depthwise"], inner, stride, groups=inner.shape[-1]))
    out = conv(params["project"], inner)
    return x + out if out.shape == x.shape else out


def conv(params, x, stride=1, groups=1):
    """A convolution and its batch norm, at the averages of training."""
    dims, strides = ("NHWC", "HWIO", "NHWC"), (stride, stride)
    kernel, norm = params["kernel"], params["norm"]
    x = lax.conv_general_dilated(
        x, kernel, strides, "SAME", dimension_numbers=dims, feature_group_count=groups
    )
    scale = norm["scale"] * lax.rsqrt(norm["var"] + EPSILON)
    return (x - norm["mean"]) * scale + norm["bias"]


def load(folder):
    """The parameters from a folder that `fetch("efficientnet_lite0")` made."""
    flat = torch_files.read(next(folder.glob("*.pth")))
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

    def layer(conv, norm):
        # From output, input, height, width.
        kernel = flat[f"{conv}.weight"].transpose(2, 3, 1, 0)
        return {"kernel": kernel, "norm": {k: flat[f"{norm}.{v}"] for k, v in names.items()}}

    def layers(own):
        parts = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
        there = {k: v for k, v in parts.items() if f"{own}._{k}_conv.weight" in flat}
        return {k: layer(f"{own}._{k}_conv", f"{own}.{v}") for k, v in there.items()}

    params = {
        "stem": layer("_conv_stem", "_bn0"),
        "blocks": [layers(f"_blocks.{i}") for i in range(len(STRIDES))],
        "top": layer("_conv_head", "_bn1"),
        "head": {"kernel": flat["_fc.weight"].T, "bias": flat["_fc.bias"]},
    }
    return jax.tree.map(jnp.asarray, params)


@jax.jit
def resized(images):
    """Images of 28x28 grey bytes as colored ones, (n, SIZE, SIZE, 3)."""
    shape = (len(images), SIZE, SIZE)
    large = jax.image.resize(images.astype(jnp.float32), shape, "bilinear")
    return jnp.broadcast_to(jnp.round(large).astype(jnp.uint8)[..., None], (*shape, 3))


def batches(images, labels, count, size=100):
    """The first ``count`` images and their labels."""
    return [
        (resized(images[i : i + size]), labels[i : i + size].astype(np.int32))
        for i in range(0, count, size)
    ]


def probe(params, training):
    """The parameters with another last layer, fitted to features by ridge regression."""
    width = params["head"]["kernel"].shape[0]
    features = params | {"head": {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}}
    run = jax.jit(apply)
    x = np.concatenate([run(features, images) for images, _ in training])
    y = np.concatenate([labels for _, labels in training])
    kernel, bias = ridge(x, y, PENALTY)
    return params | {"head": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}


def ridge(x, y, penalty):
    """The linear classifier of least squares, with ``penalty`` per example on squared weights."""
    mean = x.mean(0)
    centred, targets = x - mean, np.eye(y.max() + 1, dtype=np.float32)[y]
    gram = centred.T @ centred + penalty * len(x) * np.eye(x.shape[1], dtype=np.float32)
    kernel = np.linalg.solve(gram, centred.T @ (targets - targets.mean(0)))
    return kernel, targets.mean(0) - mean @ kernel


def main():
    """Compares float32 and int8 by a linear probe, and by their answers."""
    params = load(fetch("efficientnet_lite0"))
    training, test = data.fashion_mnist()
    held_out = batches(*test, 1000)
    fitted = probe(params, batches(*training, 3000))
    title = "EfficientNet-Lite0: linear probe, 1000 test images of Fashion-MNIST"
    found = show(title, apply, fitted, held_out, ["accuracy", "f1_macro"], WEIGHTS, rounds=3)
    run = jax.jit(apply)
    answers = [(images, jnp.argmax(run(params, images), -1)) for images, _ in held_out]
    small = int8(apply, params, answers[0][:1], WEIGHTS)
    same = jc.evaluate(apply, small, answers, ["accuracy"], on_fallback="error")["accuracy"]
    print(f"ImageNet's classes: int8 answers as float32 for {same:.1%} of the images")
    return found | {"imagenet_agreement": same}


if __name__ == "__main__":
    main()
