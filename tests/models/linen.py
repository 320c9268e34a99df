"""Flax linen models; parameters are the whole dictionary of variables."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from .case import Case, conv, dot, filled, lookup, normal


class _MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(24)(x))
        x = nn.gelu(nn.Dense(32)(x))
        return nn.Dense(12, use_bias=False)(x)


class _ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 5), strides=(2, 1), padding="SAME", name="strided")(x)
        x = nn.Conv(24, (3, 3), feature_group_count=2, padding=((1, 2), (0, 1)), name="grouped")(
            nn.relu(x)
        )
        x = nn.Conv(
            24, (2, 4), feature_group_count=24, padding="VALID", use_bias=False, name="depthwise"
        )(nn.relu(x))
        x = nn.Conv(32, (2, 3), kernel_dilation=(2, 1), padding="SAME", name="dilated")(x)
        x = nn.avg_pool(nn.relu(x), (2, 2), strides=(2, 2))
        return nn.Conv(12, (4,), padding="CAUSAL", name="one_dimensional")(x.mean(1))


class _TiedEmbedding(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(24, 16)
        x = nn.tanh(nn.Dense(24)(embed(ids)))
        return embed.attend(nn.Dense(16)(x))


class _Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3,), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        return nn.Dense(12)(x)


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(
            num_heads=2, qkv_features=24, use_bias=False, name="attention"
        )(y, y)
        x = x + y
        y = nn.gelu(nn.Dense(40, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(16, name="down")(y), None


class _Transformer(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(24, 16)
        blocks = nn.scan(
            nn.remat(_Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = blocks(name="blocks")(embed(ids), None)
        return embed.attend(nn.LayerNorm()(x))


def _applied(module, args, **options):
    """A maker that initializes with `args()` and applies to them."""

    def make():
        arrays = args()
        variables = filled(jax.eval_shape(module.init, jax.random.key(0), *arrays))
        return (
            (lambda variables, *args: module.apply(variables, *args, **options)),
            variables,
            arrays,
        )

    return make


def _attention_args():
    return normal(0, 2, 5, 16), normal(1, 2, 7, 32)


def _ids():
    return (jnp.arange(14).reshape(2, 7) * 5 % 24,)


def _recurrent(cell):
    return _applied(nn.RNN(cell), lambda: (normal(0, 2, 6, 24),))


_LSTM_USES = {
    f"params/cell/{source}{gate}/kernel": [dot(count=6)] for source in "ih" for gate in "ifgo"
}

CASES = [
    Case(
        "linen_mlp",
        _applied(_MLP(), lambda: (normal(0, 5, 16),)),
        {f"params/Dense_{i}/kernel": [dot()] for i in range(3)},
    ),
    Case(
        "linen_conv_net",
        _applied(_ConvNet(), lambda: (normal(0, 2, 12, 10, 8),)),
        {
            "params/strided/kernel": [conv((-4, -3, -2), (-1,))],
            "params/grouped/kernel": [conv((-4, -3, -2), (-1,))],
            "params/depthwise/kernel": [conv((-4, -3, -2), (-1,))],
            "params/dilated/kernel": [conv((-4, -3, -2), (-1,))],
            "params/one_dimensional/kernel": [conv((-3, -2), (-1,))],
        },
    ),
    Case(
        "linen_attention",
        _applied(
            nn.MultiHeadDotProductAttention(
                num_heads=3, qkv_features=24, out_features=40, use_bias=False
            ),
            _attention_args,
        ),
        {
            **{f"params/{n}/kernel": [dot((-3,), (-2, -1))] for n in ("query", "key", "value")},
            "params/out/kernel": [dot((-3, -2), (-1,))],
        },
    ),
    # Biases of rank 2. Softmax cancels the keys' unless they are normalized after it is added.
    Case(
        "linen_attention_with_biases",
        _applied(
            nn.MultiHeadDotProductAttention(
                num_heads=3, qkv_features=24, out_features=40, normalize_qk=True
            ),
            _attention_args,
        ),
        {
            **{f"params/{n}/kernel": [dot((-3,), (-2, -1))] for n in ("query", "key", "value")},
            **{f"params/{n}/bias": [] for n in ("query", "key", "value")},
            "params/out/kernel": [dot((-3, -2), (-1,))],
        },
    ),
    Case(
        "linen_tied_embedding",
        _applied(_TiedEmbedding(), _ids),
        {
            "params/Embed_0/embedding": [lookup(), dot((-1,), (-2,))],
            "params/Dense_0/kernel": [dot()],
            "params/Dense_1/kernel": [dot()],
        },
    ),
    # Concatenates the four gates' kernels at every step.
    Case("linen_optimized_lstm", _recurrent(nn.OptimizedLSTMCell(16)), _LSTM_USES),
    Case("linen_lstm", _recurrent(nn.LSTMCell(16)), _LSTM_USES),
    Case(
        "linen_gru",
        _recurrent(nn.GRUCell(16)),
        {f"params/cell/{s}{gate}/kernel": [dot(count=6)] for s in "ih" for gate in "rzn"},
    ),
    Case(
        "linen_batch_norm",
        _applied(_Normalized(), lambda: (normal(0, 3, 7, 8),), mutable=["batch_stats"]),
        {
            "params/Conv_0/kernel": [conv((-3, -2), (-1,))],
            "params/Dense_0/kernel": [dot()],
        },
    ),
    Case(
        "linen_scanned_transformer",
        _applied(_Transformer(), _ids),
        {
            "params/Embed_0/embedding": [lookup(), dot((-1,), (-2,))],
            **{
                f"params/blocks/attention/{n}/kernel": [dot((-3,), (-2, -1), stack=(-4,))]
                for n in ("query", "key", "value")
            },
            "params/blocks/attention/out/kernel": [dot((-3, -2), (-1,), stack=(-4,))],
            "params/blocks/up/kernel": [dot(stack=(-3,))],
            "params/blocks/down/kernel": [dot(stack=(-3,))],
            **{f"params/blocks/{n}/bias": [] for n in ("up", "down", "LayerNorm_0", "LayerNorm_1")},
            **{f"params/blocks/{n}/scale": [] for n in ("LayerNorm_0", "LayerNorm_1")},
        },
    ),
]
