"""Trains a pruned and quantized network on two made-up spirals, stores it, and runs it unchanged.

python examples/quickstart.py
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import jaxopt_compress as jc

STEPS = 1500


def spirals(key, count):
    """Points on two interleaved spirals, (count, 2), and which one each is on, (count,)."""
    turn_key, noise_key = jax.random.split(key)
    label = jnp.arange(count) % 2
    turn = jnp.sqrt(jax.random.uniform(turn_key, (count,), minval=0.02))
    angle = 3 * jnp.pi * turn + jnp.pi * label
    points = turn[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return points + 0.02 * jax.random.normal(noise_key, points.shape), label


def model(params, x):
    """A plain function; it knows nothing of compression."""
    for name in ("layer1", "layer2"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["out"]["kernel"] + params["out"]["bias"]


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(params, x), y).mean()


def main():
    data_key, test_key, *keys = jax.random.split(jax.random.key(0), 5)
    x, y = spirals(data_key, 1024)
    sizes = {"layer1": (2, 128), "layer2": (128, 128), "out": (128, 2)}
    init = jax.nn.initializers.he_normal()
    params = {
        name: {"kernel": init(key, shape), "bias": jnp.zeros(shape[1])}
        for key, (name, shape) in zip(keys, sizes.items(), strict=True)
    }

    # 90% of the entries of the large kernel become zero on the way; every kernel gets 8 bits.
    schedule = jc.schedules.polynomial(0.9, begin=STEPS // 5, end=STEPS // 2, every=10)
    c = jc.chain(
        jc.prune(jc.scores.magnitude(), schedule, where="layer2/kernel"),
        jc.quantize("int8", where="**/kernel"),
    )
    tx = jc.compressed_training(optax.adam(3e-3), c, uses=jc.uses(model, params, x))
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(loss)(c.view(params, opt_state), x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(STEPS):
        params, opt_state = step(params, opt_state)

    small = jc.compress(params, c, state=opt_state)  # what was trained is what is stored
    lifted = jax.jit(jc.lift(model))  # unchanged code on the small tree
    test_x, test_y = spirals(test_key, 1000)
    logits = lifted(small, test_x)
    print(jc.report(params, small))
    print(f"test accuracy: {jnp.mean(jnp.argmax(logits, axis=-1) == test_y):.1%}")
    with tempfile.TemporaryDirectory() as folder:
        jc.save(Path(folder, "small"), small)
        same = jnp.array_equal(lifted(jc.load(Path(folder, "small")), test_x), logits)
    print(f"saved, loaded, and the same logits: {same}")


if __name__ == "__main__":
    main()
