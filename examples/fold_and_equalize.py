"""Folds batch norms and equalizes channels, so that one scale per weight is enough.

The trained network is small and its channels have similar ranges already: equalization gains
nothing there. Its channels are then scaled by random factors that change nothing in float32;
trained networks with depthwise convolutions often look like that.

python examples/fold_and_equalize.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jaxopt_compress as jc

STEPS = 200
BATCH = 64
DECADES = 2  # how far the ranges of channels are apart in the badly scaled network


class Net(nn.Module):
    """Convolutions with batch norms."""

    @nn.compact
    def __call__(self, x, train=False):
        for features, stride in ((16, 1), (32, 2), (32, 2)):
            x = nn.Conv(features, (3, 3), stride, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.mean((1, 2)))


def digits():
    """Images, (count, 8, 8, 1), and labels; the last quarter is for testing."""
    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, jnp.float32)
    labels = jnp.asarray(labels)
    cut = 3 * len(labels) // 4
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


def train(images, labels):
    """Variables of a trained network."""
    variables = Net().init(jax.random.key(0), images[:1])
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, STEPS))

    @jax.jit
    def step(variables, state, key):
        at = jax.random.randint(key, (BATCH,), 0, len(labels))

        def loss(params):
            out, new = Net().apply(
                {**variables, "params": params}, images[at], train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(out, labels[at]).mean(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(grads, state)
        return {**new, "params": optax.apply_updates(variables["params"], updates)}, state

    state = optimizer.init(variables["params"])
    for key in jax.random.split(jax.random.key(1), STEPS):
        variables, state = step(variables, state, key)
    return variables


def rescale(params):
    """The same function with badly scaled channels: what one layer gains the next one loses."""
    layers = {name: dict(layer) for name, layer in params["params"].items()}
    names = ["Conv_0", "Conv_1", "Conv_2", "Dense_0"]
    keys = jax.random.split(jax.random.key(2), len(names))
    for key, name, following in zip(keys, names, names[1:], strict=False):
        kernel = layers[name]["kernel"]
        scale = 10 ** jax.random.uniform(key, kernel.shape[-1:], minval=-DECADES, maxval=0)
        layers[name]["kernel"] = kernel * scale
        # The folded bias is where the batch norm's was.
        norm = name.replace("Conv", "BatchNorm")
        layers[norm]["bias"] = layers[norm]["bias"] * scale
        layers[following]["kernel"] = layers[following]["kernel"] / scale[:, None]
    return {**params, "params": layers}


def main():
    """Prints the accuracy of each form in each format; returns it, ``{form: {format: ...}}``."""
    (images, labels), (test_images, test_labels) = digits()
    variables = train(images, labels)
    fn = Net().apply

    folded = jc.fold_norms(fn, variables, test_images)
    folded.check(fn, test_images, tolerance=1e-4)
    g = folded.function(fn)

    def accuracy(fn, params):
        return jc.evaluate(fn, params, [(test_images, test_labels)], ["accuracy"])["accuracy"]

    def row(params):
        found = {"float32": accuracy(g, params)}
        for name in ("int8", "int4"):
            small = jc.compress(params, jc.quantize(name, per="tensor"), uses=uses)
            found[name] = accuracy(g, small)
        return found

    uses = jc.uses(g, folded.params, test_images)
    results = {"trained": {"float32": accuracy(fn, variables)}}
    for name, params in (("folded", folded.params), ("badly scaled", rescale(folded.params))):
        equalized = jc.equalize(g, params, test_images)
        equalized.check(g, test_images, tolerance=0.0)  # not a bit changes
        results[name] = row(params)
        results[f"{name}, equalized"] = row(equalized.params)

    print(f"{'accuracy, one scale per weight':<32} {'float32':>8} {'int8':>8} {'int4':>8}")
    for form, found in results.items():
        cells = (f"{found[k]:8.3f}" if k in found else " " * 8 for k in ("float32", "int8", "int4"))
        print(f"{form:<32}", *cells)
    return results


if __name__ == "__main__":
    main()
