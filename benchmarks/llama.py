"""Llama 3 as plain functions of shapes, for programs that are compiled and never run.

    decode(params, cache, tokens, position)   one token for each sequence
    loss(params, tokens)                      of next tokens, layers recomputed in the backward pass

Weights of all layers are stacked, and a scan runs them.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

BFLOAT16 = jnp.bfloat16


class Size(NamedTuple):
    """The sizes of a model, as published.

    References:
        Grattafiori et al., 2024, The Llama 3 Herd of Models.
    """

    layers: int
    width: int
    heads: int
    hidden: int
    kv_heads: int = 8
    head: int = 128
    vocabulary: int = 128256


SIZES = {"8B": Size(32, 4096, 32, 14336), "70B": Size(80, 8192, 64, 28672)}


def shapes(size: Size, dtype=BFLOAT16):
    """The parameters, as types."""
    stacked = {
        "query": (size.width, size.heads * size.head),
        "key": (size.width, size.kv_heads * size.head),
        "value": (size.width, size.kv_heads * size.head),
        "out": (size.heads * size.head, size.width),
        "gate": (size.width, size.hidden),
        "up": (size.width, size.hidden),
        "down": (size.hidden, size.width),
        "attention_norm": (size.width,),
        "mlp_norm": (size.width,),
    }
    made = {name: (size.layers, *shape) for name, shape in stacked.items()}
    flat = {"embedding": (size.vocabulary, size.width), "norm": (size.width,)}
    flat["head"] = (size.width, size.vocabulary)
    kind = lambda shape: jax.ShapeDtypeStruct(shape, dtype)
    return {"layers": {k: kind(v) for k, v in made.items()}} | {k: kind(v) for k, v in flat.items()}


def spec_of(path, ndim, rows=None):
    """Megatron's split over "model"; the other axis of each weight over `rows`, for training."""
    name = path.rpartition("/")[2]
    if name in ("out", "down", "embedding"):
        return P(*(None,) * (ndim - 2), "model", rows)
    if "norm" in name:
        return P()
    return P(*(None,) * (ndim - 2), rows, "model")


def cache_of(size: Size, sequences, length):
    """Keys and values of the tokens so far."""
    shape = (size.layers, sequences, length, size.kv_heads, size.head)
    return {name: jax.ShapeDtypeStruct(shape, BFLOAT16) for name in ("key", "value")}


CACHE = P(None, "data", None, "model", None)


def decode(params, cache, tokens, position):
    """Logits ``[n, vocabulary]`` and the cache, from tokens ``[n]`` at one position."""

    def layer(x, given):
        layer, keys, values = given
        y = norm(x, layer["attention_norm"])
        q, k, v = (heads_of(y @ layer[name], keys.shape[-1]) for name in ("query", "key", "value"))
        q, k = rotated(q[:, None], position), rotated(k[:, None], position)
        keys = lax.dynamic_update_slice_in_dim(keys, k, position, 1)
        values = lax.dynamic_update_slice_in_dim(values, v[:, None], position, 1)
        seen = jnp.arange(keys.shape[1]) <= position
        y = attended(q, keys, values, seen[None, :])
        return mlp(x + y[:, 0] @ layer["out"], layer), (keys, values)

    x = params["embedding"][tokens]
    x, (keys, values) = lax.scan(layer, x, (params["layers"], cache["key"], cache["value"]))
    logits = norm(x, params["norm"]) @ params["head"]
    return logits, {"key": keys, "value": values}


def loss(params, tokens, placed=lambda x: x):
    """Mean cross entropy of tokens ``[n, length + 1]``; `placed` says where activations lie."""

    @jax.checkpoint
    def layer(x, layer):
        length = x.shape[1]
        y, head = norm(x, layer["attention_norm"]), 128
        q, k, v = (heads_of(y @ layer[name], head) for name in ("query", "key", "value"))
        q, k = rotated(q, jnp.arange(length)), rotated(k, jnp.arange(length))
        y = attended(q, k, v, jnp.tri(length, dtype=bool))
        return placed(mlp(placed(x + y @ layer["out"]), layer)), None

    x = lax.scan(layer, placed(params["embedding"][tokens[:, :-1]]), params["layers"])[0]
    logits = (norm(x, params["norm"]) @ params["head"]).astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - chosen).mean()


def norm(x, scale):
    """RMSNorm (Zhang and Sennrich, 2019)."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def mlp(x, layer):
    """The gated half of a layer, with its residual (Shazeer, 2020)."""
    y = norm(x, layer["mlp_norm"])
    return x + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"]


def heads_of(x, head):
    """``[..., heads, head]``."""
    return x.reshape(*x.shape[:-1], -1, head)


def rotated(x, position):
    """Rotary embeddings of ``[n, length, heads, head]`` (Su et al., 2021)."""
    half = x.shape[-1] // 2
    angle = jnp.asarray(position, jnp.float32)[..., None] * 500000.0 ** (-jnp.arange(half) / half)
    angle = angle.reshape(-1, 1, half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attended(q, k, v, seen):
    """``[n, length, width]`` of grouped-query attention; `seen` is ``[queries, keys]``."""
    n, length, heads, head = q.shape
    q = q.reshape(n, length, k.shape[2], -1, head)
    scores = jnp.einsum("nqkgh,nskh->nkgqs", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen, scores / math.sqrt(head), -jnp.inf)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.einsum("nkgqs,nskh->nqkgh", weights, v).reshape(n, length, heads * head)
