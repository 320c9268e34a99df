"""Compresses a trained transformer layer after layer, and compares with all layers at once.

A small vision transformer is trained on scikit-learn's digits. Its scanned stack of layers is then
compressed with data and without training: per parameter the best of three ways to round weights,
chosen on held-out images, and activations of 4 or 8 bits by calibrated scales.

python examples/layer_by_layer.py
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jaxopt_compress as jc

WIDTH, LAYERS, BATCH = 64, 4, 100


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(h, h)
        h = nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH)(nn.gelu(h)), None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, images):
        n = images.shape[0]
        patches = images.reshape(n, 4, 2, 4, 2).swapaxes(2, 3).reshape(n, 16, 4)
        x = nn.Dense(WIDTH)(patches)
        x = x + self.param("position", nn.initializers.normal(0.1), (16, WIDTH))
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": LAYERS}
        x, _ = nn.scan(nn.remat(Block), **axes)()(x, None)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


MODEL = Transformer()


def trained(images, labels, steps):
    tx = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2)
    params = MODEL.init(jax.random.key(0), images[:1])
    state = tx.init(params)

    @jax.jit
    def step(params, state, key):
        rows = jax.random.choice(key, images.shape[0], (128,))

        def loss(params):
            logits = MODEL.apply(params, images[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for key in jax.random.split(jax.random.key(1), steps):
        params, state = step(params, state, key)
    return params


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    parser.add_argument("--resume", help="a folder to keep decisions in, and to go on from")
    args = parser.parse_args()

    digits = load_digits()
    order = jax.random.permutation(jax.random.key(2), len(digits["target"]))
    images = jnp.asarray(digits["images"], jnp.float32)[order] / 16
    labels = jnp.asarray(digits["target"])[order]
    # The first 1000 train, the next 200 calibrate, 200 choose, and the others test.
    params = trained(images[:1000], labels[:1000], args.steps)
    batches = [images[i : i + BATCH] for i in (1000, 1100)]
    held_out = [images[i : i + BATCH] for i in (1200, 1300)]
    test, truth = images[1400:], labels[1400:]
    accuracy = lambda p: jc.evaluate(MODEL.apply, p, [(test, truth)], ["accuracy"])["accuracy"]
    print(f"float32: {accuracy(params):.1%}, {jc.nbytes(params):,} bytes")

    fn, where = MODEL.apply, "**/kernel"
    uses = jc.uses(fn, params, batches[0])
    stats, unseen = (jc.calibrate(fn, params, xs, where=where) for xs in (batches, held_out))

    def candidates(activations, stats=None):
        act = jc.activations(activations, "calibrated")
        ways = ({}, {"bounds": jc.bounds.mse()}, {"symmetric": False})
        return jc.best_of(
            *(jc.quantize("int3", where=where, activations=act, **way) for way in ways),
            stats=stats,
        )

    for activations in ("int8", "int4"):
        at_once = jc.compress(params, candidates(activations, unseen), uses=uses, stats=stats)
        in_order = jc.compress_in_order(
            fn,
            params,
            candidates(activations),
            batches,
            uses=uses,
            held_out=held_out,
            resume=args.resume and f"{args.resume}/{activations}",
            progress=False,
        )
        for name, small in (("all at once", at_once), ("layer after layer", in_order)):
            print(
                f"int3 weights, {activations} activations, {name}: {accuracy(small):.1%}, "
                f"{jc.nbytes(small):,} bytes"
            )
    print(jc.report(params, in_order, unseen))


if __name__ == "__main__":
    main()
