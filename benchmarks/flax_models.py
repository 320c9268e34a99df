"""Models for benchmarks as Flax modules, which other libraries for quantization need."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
    """Dense layers with ReLU between them.

    Attributes:
        width: Of each layer.
        layers: How many.
        dot_general: What multiplies in dense layers; by default that of JAX.
    """

    width: int
    layers: int
    dot_general: Any = None

    @nn.compact
    def __call__(self, x):
        """``x`` of shape ``[batch, in]``."""
        for i in range(self.layers):
            x = nn.Dense(self.width, dot_general=self.dot_general)(nn.relu(x) if i else x)
        return x


class Block(nn.Module):
    """A causal pre-norm transformer block."""

    width: int
    head_dim: int = 64
    dot_general: Any = None

    @nn.compact
    def __call__(self, x):
        """``x`` of shape ``[batch, time, width]``."""
        dense = lambda n, name, bias=False: nn.Dense(
            n, use_bias=bias, dot_general=self.dot_general, name=name
        )
        inputs = nn.RMSNorm()(x)
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (
            dense(self.width, n)(inputs).reshape(heads)
            for n in ("dense_query", "dense_key", "dense_value")
        )
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + dense(self.width, "dense_out")(mixed)
        hidden = nn.gelu(dense(4 * self.width, "dense_up", True)(nn.RMSNorm()(x)))
        return x + dense(self.width, "dense_down", True)(hidden)


class Transformer(nn.Module):
    """A decoder: embedding, blocks, norm, output kernel."""

    width: int
    layers: int
    vocabulary: int
    dot_general: Any = None

    @nn.compact
    def __call__(self, tokens):
        """Logits ``[batch, time, vocabulary]`` for int32 tokens ``[batch, time]``."""
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        for _ in range(self.layers):
            x = Block(self.width, dot_general=self.dot_general)(x)
        head = nn.Dense(
            self.vocabulary, use_bias=False, dot_general=self.dot_general, name="dense_head"
        )
        return head(nn.RMSNorm()(x)).astype(jnp.float32)
