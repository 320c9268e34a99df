"""all-MiniLM-L6-v2: a BERT of 6 layers and 22.7M weights that turns sentences into vectors.

Prints the rank correlation of cosine similarities with those that people gave to the sentence pairs
of the STS Benchmark's test part, for float32 and for int8 weights.

    python -m examples.models.minilm

References:
    Wang et al., 2020, MiniLM: Deep Self-Attention Distillation.
    Reimers and Gurevych, 2019, Sentence-BERT.
"""

from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np

from examples import data
from examples.fetching import fetch
from examples.models.common import attention, dense, layer_norm, run_layers, show
from jaxopt_compress.extras import require

HEADS, EPSILON = 12, 1e-12
# The largest number of tokens that the model was tuned with.
LONGEST = 256
WEIGHTS = ["**/kernel", "embeddings/word/embedding"]


def apply(params, ids):
    """Vectors of length 1, (n, width), of sentences: token ids, (n, length), padded with 0."""
    inside = ids > 0
    table = params["embeddings"]
    x = table["word"]["embedding"][ids] + table["position"]["embedding"][: ids.shape[1]]
    x = layer_norm(table["norm"], x + table["type"]["embedding"][0], EPSILON)
    x = run_layers(lambda layer, x: block(layer, x, inside), params["layers"], x)
    pooled = jnp.sum(x * inside[..., None], axis=1)
    return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)


def block(params, x, inside):
    """One layer of BERT, with norms behind the sums, that sees the tokens ``inside``.

    References:
        Devlin et al., 2019, BERT: Pre-training of Deep Bidirectional Transformers.
    """
    attended = attention(params["attention"], x, HEADS, inside[:, None, None, :])
    x = layer_norm(params["attention"]["norm"], x + attended, EPSILON)
    hidden = jax.nn.gelu(dense(params["mlp"]["up"], x), approximate=False)
    return layer_norm(params["mlp"]["norm"], x + dense(params["mlp"]["down"], hidden), EPSILON)


def similarity(params, first, second):
    """Cosine similarities, (n,), of sentences in pairs."""
    return jnp.sum(apply(params, first) * apply(params, second), axis=-1)


def load(folder):
    """The parameters from a folder that `fetch("minilm")` made."""
    read = require("safetensors.numpy", extra="examples").load_file
    flat = read(folder / "model.safetensors")

    def layer(prefix):
        return {"kernel": flat[f"{prefix}.weight"].T, "bias": flat[f"{prefix}.bias"]}

    def norm(prefix):
        return {"scale": flat[f"{prefix}.weight"], "bias": flat[f"{prefix}.bias"]}

    def layer_at(i):
        own = f"encoder.layer.{i}"
        attention = {k: layer(f"{own}.attention.self.{k}") for k in ("query", "key", "value")}
        attention["output"] = layer(f"{own}.attention.output.dense")
        attention["norm"] = norm(f"{own}.attention.output.LayerNorm")
        mlp = {"up": layer(f"{own}.intermediate.dense"), "down": layer(f"{own}.output.dense")}
        return {"attention": attention, "mlp": mlp | {"norm": norm(f"{own}.output.LayerNorm")}}

    kinds = {"word": "word", "position": "position", "type": "token_type"}
    tables = {k: {"embedding": flat[f"embeddings.{v}_embeddings.weight"]} for k, v in kinds.items()}
    count = len({name.split(".")[2] for name in flat if name.startswith("encoder.layer.")})
    params = {
        "embeddings": tables | {"norm": norm("embeddings.LayerNorm")},
        "layers": [layer_at(i) for i in range(count)],
    }
    return jax.tree.map(jnp.asarray, params)


def tokenizer(folder):
    """From sentences to token ids, with marks at both ends."""
    made = require("tokenizers", extra="examples").Tokenizer.from_file(
        str(folder / "tokenizer.json")
    )
    made.enable_truncation(LONGEST)
    made.no_padding()
    return lambda sentences: [each.ids for each in made.encode_batch(sentences)]


def pairs(tokenize, split="test", size=64):
    """Batches ``((first, second), similarity, weights)`` of pairs of similar length.

    Lengths are padded to multiples of 16 and batches filled up with weight 0: few shapes compile.
    """
    first, second, scores = zip(*data.stsb(split), strict=True)
    first, second = tokenize(list(first)), tokenize(list(second))
    by_length = defaultdict(list)
    for a, b, score in zip(first, second, scores, strict=True):
        by_length[-(-max(len(a), len(b)) // 16) * 16].append((a, b, score))
    batches = []
    for length, group in sorted(by_length.items()):
        for start in range(0, len(group), size):
            ids, targets, weights = np.zeros((2, size, length), np.int32), *np.zeros((2, size))
            for row, (a, b, score) in enumerate(group[start : start + size]):
                ids[0, row, : len(a)], ids[1, row, : len(b)] = a, b
                targets[row], weights[row] = score, 1
            batches.append((tuple(ids), targets, weights))
    return batches


def main():
    """Compares float32 and int8 on the test part of the STS Benchmark."""
    folder = fetch("minilm")
    batches = pairs(tokenizer(folder))
    title = "MiniLM: rank correlation on the 1379 pairs of the STS Benchmark's test part"
    return show(title, similarity, load(folder), batches, ["spearman"], WEIGHTS)


if __name__ == "__main__":
    main()
