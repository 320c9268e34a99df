"""Equinox models (weights are [out, in]) and Haiku ones."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp

from .case import Case, conv, dot, filled, normal


class _EquinoxNet(eqx.Module):
    conv: eqx.nn.Conv2d
    attention: eqx.nn.MultiheadAttention

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(8, 16, (3, 2), stride=(2, 1), padding=1, key=first)
        self.attention = eqx.nn.MultiheadAttention(
            num_heads=3,
            query_size=16,
            output_size=40,
            qk_size=8,
            vo_size=8,
            use_output_bias=True,
            key=second,
        )

    def __call__(self, x):
        """Features of an image [channels, height, width], as tokens that attend to each other."""
        x = jax.nn.relu(self.conv(x))
        tokens = x.reshape(x.shape[0], -1).T
        return self.attention(tokens, tokens, tokens)


def _partitioned(model, args):
    """A maker that differentiates the arrays of a model and vmaps it over examples."""

    def make():
        made = filled(eqx.filter_eval_shape(model, jax.random.key(0)))
        params, static = eqx.partition(made, eqx.is_inexact_array)
        return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, args()

    return make


def _haiku(forward, args):
    """A maker that transforms `forward`."""

    def make():
        net = hk.without_apply_rng(hk.transform(forward))
        shapes = jax.eval_shape(net.init, jax.random.key(0), *args())
        return net.apply, filled(shapes), args()

    return make


def _conv_net(x):
    x = jax.nn.relu(hk.Conv2D(16, (3, 5), stride=2)(x))
    x = jax.nn.relu(hk.Conv2D(24, (2, 3), rate=2, feature_group_count=2)(x))
    x = hk.Linear(32)(x.mean((1, 2)))
    return hk.Linear(12, with_bias=False)(jnp.tanh(x))


def _unrolled(core):
    """A recurrent core over inputs of shape [time, batch, features]."""

    def forward(x):
        cell = core(16)
        outputs, _ = hk.dynamic_unroll(cell, x, cell.initial_state(x.shape[1]))
        return hk.Linear(12)(outputs)

    return forward


CASES = [
    Case(
        "equinox_mlp",
        _partitioned(
            lambda key: eqx.nn.MLP(16, 12, width_size=24, depth=2, key=key),
            lambda: (normal(0, 5, 16),),
        ),
        {f"layers/{i}/weight": [dot((-1,), (-2,))] for i in range(3)},
    ),
    # The bias of a convolution is [out, 1, 1].
    Case(
        "equinox_conv_attention",
        _partitioned(_EquinoxNet, lambda: (normal(0, 2, 8, 6, 5),)),
        {
            "conv/weight": [conv((-3, -2, -1), (-4,))],
            "conv/bias": [],
            **{
                f"attention/{n}_proj/weight": [dot((-1,), (-2,))]
                for n in ("query", "key", "value", "output")
            },
        },
    ),
    Case(
        "haiku_conv_net",
        _haiku(_conv_net, lambda: (normal(0, 2, 8, 10, 8),)),
        {
            "conv2_d/w": [conv((-4, -3, -2), (-1,))],
            "conv2_d_1/w": [conv((-4, -3, -2), (-1,))],
            "linear/w": [dot()],
            "linear_1/w": [dot()],
        },
    ),
    # One kernel for the concatenated input and hidden state.
    Case(
        "haiku_lstm",
        _haiku(_unrolled(hk.LSTM), lambda: (normal(0, 6, 2, 24),)),
        {"lstm/linear/w": [dot(count=6)], "linear/w": [dot()]},
    ),
    # The hidden kernel is split into the gates' and the candidate's: two products a step.
    Case(
        "haiku_gru",
        _haiku(_unrolled(hk.GRU), lambda: (normal(0, 6, 2, 24),)),
        {"gru/w_i": [dot(count=6)], "gru/w_h": [dot(count=12)], "linear/w": [dot()]},
    ),
]
