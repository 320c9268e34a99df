"""Models for benchmarks, as plain functions of a parameter tree."""

import math

import jax
import jax.numpy as jnp
import optax


def matrix(key, *shape):
    """A float32 weight whose products keep the variance of their inputs."""
    return jax.random.normal(key, shape) / math.sqrt(math.prod(shape[:-1]))


def mlp_init(key, sizes):
    """The parameters of an MLP: for each layer a kernel ``[in, out]`` and a bias."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"kernel": matrix(k, n, m), "bias": jnp.zeros(m)}
        for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def mlp(params, x):
    """``x`` of shape ``[batch, in]`` through dense layers with ReLU between them."""
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def block_init(key, width, hidden=None):
    """The parameters of a transformer block: attention and an MLP, each behind an RMS norm."""
    q, k, v, o, up, down = jax.random.split(key, 6)
    hidden = hidden or 4 * width
    kernels = {"query": q, "key": k, "value": v, "out": o}
    return {
        "attention": {name: {"kernel": matrix(k, width, width)} for name, k in kernels.items()},
        "mlp": {
            "up": {"kernel": matrix(up, width, hidden), "bias": jnp.zeros(hidden)},
            "down": {"kernel": matrix(down, hidden, width), "bias": jnp.zeros(width)},
        },
        "norm_attention": {"scale": jnp.ones(width)},
        "norm_mlp": {"scale": jnp.ones(width)},
    }


def block(params, x, head_dim=64):
    """A causal pre-norm transformer block; ``x`` has the shape ``[batch, time, width]``."""
    names = ("query", "key", "value")
    inputs = rms_norm(params["norm_attention"], x)
    heads = (*x.shape[:-1], x.shape[-1] // head_dim, head_dim)
    q, k, v = ((inputs @ params["attention"][n]["kernel"]).reshape(heads) for n in names)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
    x = x + mixed @ params["attention"]["out"]["kernel"]
    up, down = params["mlp"]["up"], params["mlp"]["down"]
    hidden = jax.nn.gelu(rms_norm(params["norm_mlp"], x) @ up["kernel"] + up["bias"])
    return x + hidden @ down["kernel"] + down["bias"]


def rms_norm(params, x):
    """``x`` over its root mean square along the last axis, times a scale."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * params["scale"]


def transformer_init(key, layers, width, vocabulary):
    """The parameters of a decoder: embedding, blocks, norm, output kernel."""
    first, last, *keys = jax.random.split(key, layers + 2)
    return {
        "embed": {"embedding": jax.random.normal(first, (vocabulary, width))},
        "blocks": [block_init(k, width) for k in keys],
        "norm": {"scale": jnp.ones(width)},
        "head": {"kernel": matrix(last, width, vocabulary)},
    }


def transformer(params, tokens):
    """Logits ``[batch, time, vocabulary]`` for int32 tokens ``[batch, time]``."""
    x = params["embed"]["embedding"][tokens]
    for layer in params["blocks"]:
        x = block(layer, x)
    return rms_norm(params["norm"], x) @ params["head"]["kernel"]


def cross_entropy(logits, labels):
    """The mean negative log-likelihood of int32 labels."""
    likely = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)
    return -jnp.mean(likely)


def train_step(loss, tx, compression):
    """One training step, ``(state, *batch) -> state``; through the view if there is one."""

    def step(state, *batch):
        params, opt_state = state
        seen = params if compression is None else compression.view(params, opt_state)
        grads = jax.grad(loss)(seen, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step
