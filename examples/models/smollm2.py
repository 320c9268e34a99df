"""SmolLM2-135M-Instruct: a llama of 30 layers, with embeddings that are its last layer too.

Prints the perplexity of 8176 tokens each of the Brown corpus's news and fiction, for float32 and
for int8 weights. The published file holds weights of 4 bits in asymmetric groups of 32 (Q4_1), and
float32 is what they decode to: formats that contain those lose nothing by construction, so this
model is for pruning, low rank, other groups and fewer bits.

    python -m examples.models.smollm2

References:
    Allal et al., 2025, SmolLM2: When Smol Goes Big.
    Touvron et al., 2023, LLaMA: Open and Efficient Foundation Language Models.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from examples import data
from examples.fetching import fetch
from examples.models.common import dense, run_layers, show
from jaxopt_compress.extras import require

HEADS, KEY_HEADS, ROTATION, EPSILON = 9, 3, 100_000.0, 1e-5
WEIGHTS = ["**/kernel", "tokens/embedding"]


def attend(query, key, value):
    """Causal attention, (n, length, heads, size), where queries may have more heads than keys."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def apply(params, ids, attend=attend):
    """Logits of the next token, (n, length, vocabulary), after each of the tokens (n, length)."""
    table = params["tokens"]["embedding"]
    layer = functools.partial(block, attend=attend)
    x = run_layers(layer, params["layers"], table[ids])
    return rms_norm(params["norm"], x) @ table.T


def block(params, x, attend):
    """One layer: attention with fewer key heads, and a gated perceptron."""
    x = x + attention(params["attention"], rms_norm(params["attention"]["norm"], x), attend)
    mlp, normed = params["mlp"], rms_norm(params["mlp"]["norm"], x)
    return x + dense(
        mlp["down"], jax.nn.silu(dense(mlp["gate"], normed)) * dense(mlp["up"], normed)
    )


def attention(params, x, attend):
    """Attention to the same and to earlier tokens, with rotated queries and keys."""
    split = lambda name, heads: dense(params[name], x).reshape(*x.shape[:2], heads, -1)
    query, key = rotated(split("query", HEADS)), rotated(split("key", KEY_HEADS))
    out = attend(query, key, split("value", KEY_HEADS))
    return dense(params["output"], out.reshape(*x.shape[:2], -1))


def rotated(x):
    """Rotates pairs of neighbors, (n, length, heads, size), by angles that grow with the position.

    References:
        Su et al., 2021, RoFormer: Enhanced Transformer with Rotary Position Embedding.
    """
    length, size = x.shape[1], x.shape[-1]
    frequency = ROTATION ** (-jnp.arange(0, size, 2) / size)
    angle = jnp.arange(length)[:, None, None] * frequency
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


def rms_norm(params, x):
    """Divides by the root of the mean square (Zhang and Sennrich, 2019)."""
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON) * params["scale"]


def reader(folder):
    """The published file, opened."""
    path = next(folder.glob("*.gguf"))
    return require("gguf", extra="examples").GGUFReader(path)


def load(folder):
    """The parameters from a folder that `fetch("smollm2")` made, in float32."""
    decode = require("gguf", extra="examples").dequantize
    file = reader(folder)
    flat = {t.name: np.float32(decode(t.data, t.tensor_type)) for t in file.tensors}
    names = {"query": "attn_q", "key": "attn_k", "value": "attn_v", "output": "attn_output"}
    parts = {
        "attention": names | {"norm": "attn_norm"},
        "mlp": {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down", "norm": "ffn_norm"},
    }

    def leaf(name, w):
        return {"scale": w} if name == "norm" else {"kernel": w.T}

    def layer(i):
        return {
            part: {k: leaf(k, flat[f"blk.{i}.{v}.weight"]) for k, v in inner.items()}
            for part, inner in parts.items()
        }

    params = {
        "tokens": {"embedding": flat["token_embd.weight"]},
        "layers": [layer(i) for i in range(int(file.fields["llama.block_count"].contents()))],
        "norm": {"scale": flat["output_norm.weight"]},
    }
    return jax.tree.map(jnp.asarray, params)


def tokenizer(folder):
    """From a text to token ids."""
    tokenizers = require("tokenizers", extra="examples")
    read = reader(folder)
    names = ("tokens", "merges", "token_type")
    fields = {name: read.fields[f"tokenizer.ggml.{name}"].contents() for name in names}
    words = {word: i for i, word in enumerate(fields["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=merges))
    split = tokenizers.pre_tokenizers
    made.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    # Of the third type are marks such as the end of a text.
    marks = [w for w, kind in zip(fields["tokens"], fields["token_type"], strict=True) if kind == 3]
    made.add_special_tokens([tokenizers.AddedToken(word, special=True) for word in marks])
    return lambda text: made.encode(text).ids


def windows(tokenize, category, count=16, length=512, size=2):
    """Batches ``(ids, next ids)`` of the first tokens of a category of the Brown corpus."""
    texts = [text for _, own, text in data.brown() if own == category]
    ids = np.asarray(tokenize("\n".join(texts))[: count * length], np.int32)
    ids = ids.reshape(count, length)
    parts = (ids[i : i + size] for i in range(0, count, size))
    return [(part[:, :-1], part[:, 1:]) for part in parts]


def main(categories=("news", "fiction")):
    """Compares float32 and int8 by the perplexity of texts."""
    folder = fetch("smollm2")
    params, tokenize, found = load(folder), tokenizer(folder), {}
    for category in categories:
        batches = windows(tokenize, category)
        title = f"SmolLM2: 8176 tokens of the Brown corpus, {category}"
        metrics = ["perplexity", "accuracy"]
        found[category] = show(title, apply, params, batches, metrics, WEIGHTS, rounds=1)
    return found


if __name__ == "__main__":
    main()
