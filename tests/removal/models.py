"""The networks with the groups that they have, counted by hand."""

import functools

import flax.linen as nn
import jax.numpy as jnp

from tests.removal.networks import (
    CNN,
    IMAGE,
    LM,
    MLP,
    Depthwise,
    Gated,
    Recurrent,
    ResNet,
    UNet,
    equinox_transformer,
    experts,
    linen,
    nnx_attention,
    vision,
)

VISION = {"patch:1": 10, "out:0": 3, "out:0.2": 4, "up:1": 14, "blocks": 2}
ATTENTION = "Block_0/MultiHeadDotProductAttention_0"
MODELS = {
    "mlp": (lambda: linen(MLP(), (4, 8)), {"Dense_0/kernel:1": 16, "Dense_2/kernel:1": 12}),
    "cnn": (
        lambda: linen(CNN(), IMAGE),
        {"Conv_0/kernel:3": 8, "Conv_1/kernel:3": 6, "Dense_1/kernel:1": 10},
    ),
    "resnet": (
        lambda: linen(ResNet(), IMAGE),
        {
            "Conv_0/kernel:3": 8,
            "Residual_0/Conv_1/kernel:3": 8,
            "Residual_1/Conv_0/kernel:3": 12,
            "Residual_1/Conv_1/kernel:3": 12,
            "Residual_2/Conv_1/kernel:3": 12,
            "blocks": 2,
        },
    ),
    "unet": (
        lambda: linen(UNet(), IMAGE),
        {"Conv_0/kernel:3": 8, "Conv_1/kernel:3": 12, "ConvTranspose_0/kernel:3": 10},
    ),
    "depthwise": (
        lambda: linen(Depthwise(), IMAGE),
        {
            "Conv_0/kernel:3": 8,
            "Conv_1/kernel:3": 2,
            "Dense_1/kernel:1": 5,
            "Conv_2/kernel:3": 3,
            "Conv_3/kernel:2": 4,
            "Conv_3/kernel:3": 4,
        },
    ),
    "transformer": (
        lambda: linen(LM(), (2, 5), jnp.int32),
        {
            "Embed_0/embedding:1": 16,
            f"{ATTENTION}/query/kernel:1": 4,
            f"{ATTENTION}/query/kernel:2": 4,
            f"{ATTENTION}/value/kernel:2": 4,
            "Block_0/Dense_1/kernel:1": 24,
            "blocks": 2,
        },
    ),
    "scanned_transformer": (
        lambda: linen(LM(True, nn.RMSNorm), (2, 5), jnp.int32),
        {
            "Embed_0/embedding:1": 16,
            "ScanCheckpointBlock_0/RMSNorm_0/scale:0": 3,
            f"ScanCheckpoint{ATTENTION}/query/kernel:2": 4,
            f"ScanCheckpoint{ATTENTION}/query/kernel:3": 4,
            f"ScanCheckpoint{ATTENTION}/value/kernel:3": 4,
            "ScanCheckpointBlock_0/Dense_1/kernel:2": 24,
        },
    ),
    "gated_transformer": (
        lambda: linen(Gated(), (2, 5, 8)),
        {
            "Dense_0/kernel:1": 16,
            "Dense_1/kernel:1": 2,
            "Dense_1/kernel:1.2": 2,
            "Dense_2/kernel:1": 4,
            "Dense_2/kernel:1.2": 8,
            "Dense_6/kernel:0": 20,
            "blocks": 2,
        },
    ),
    "recurrent": (
        lambda: linen(Recurrent(), (2, 5, 8)),
        {"GRUCell_0/ir/kernel:1": 12, "OptimizedLSTMCell_0/hi/kernel:0": 10},
    ),
    "nnx_attention": (
        nnx_attention,
        {
            "i/kernel:1": 16,
            "a/query/kernel:1": 4,
            "a/query/kernel:2": 4,
            "a/value/kernel:2": 4,
            "blocks": 1,
        },
    ),
    "equinox_transformer": (
        equinox_transformer,
        {
            "i/weight:0": 16,
            "a/query_proj/weight:0": 4,
            "a/query_proj/weight:0.2": 4,
            "a/value_proj/weight:0": 4,
            "m/layers/0/weight:0": 24,
            "m/layers/1/weight:0": 24,
            "blocks": 2,
        },
    ),
    **{f"vision_{k}": (functools.partial(vision, k), VISION) for k in ("khd", "hkd", "hdk")},
    "experts": (experts, {"g:1": 4, "w:2": 12}),
}
