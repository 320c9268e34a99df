"""Flax nnx models, split into a graph definition and a state of parameters."""

import jax.numpy as jnp
from flax import nnx

from .case import Case, conv, dot, filled, lookup, normal


class _ConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 16, (3, 5), strides=(1, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(16, 24, rngs=rngs), nnx.Linear(24, 12, rngs=rngs)])

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return x


class _Attention(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(40, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=3,
            in_features=16,
            qkv_features=24,
            out_features=32,
            use_bias=False,
            decode=False,
            rngs=rngs,
        )
        self.project = nnx.LinearGeneral(32, (5, 8), rngs=rngs, use_bias=False)

    def __call__(self, ids):
        return self.project(self.attention(self.norm(self.embed(ids))))


def _split(module, args, mutable=False):
    """A maker whose function merges the parameters with everything else that the module holds."""

    def make():
        graph, params, rest = nnx.split(nnx.eval_shape(lambda: module(nnx.Rngs(0))), nnx.Param, ...)
        params, rest = filled(params), filled(rest)

        def fn(params, *args):
            model = nnx.merge(graph, params, rest, copy=True)
            out = model(*args)
            return (out, nnx.state(model, nnx.BatchStat)) if mutable else out

        return fn, params, args()

    return make


CASES = [
    Case(
        "nnx_conv_net",
        _split(_ConvNet, lambda: (normal(0, 2, 6, 10, 8),), mutable=True),
        {
            "conv/kernel": [conv((-4, -3, -2), (-1,))],
            "layers/0/kernel": [dot()],
            "layers/1/kernel": [dot()],
        },
    ),
    Case(
        "nnx_attention",
        _split(_Attention, lambda: (jnp.arange(14).reshape(2, 7) * 5 % 40,)),
        {
            "embed/embedding": [lookup()],
            **{f"attention/{n}/kernel": [dot((-3,), (-2, -1))] for n in ("query", "key", "value")},
            "attention/out/kernel": [dot((-3, -2), (-1,))],
            "project/kernel": [dot((-3,), (-2, -1))],
        },
    ),
]
