"""Compresses MiniLM without training, and measures what each way to round costs.

all-MiniLM-L6-v2 turns sentences into vectors. Its 36 kernels are rounded to few bits, some methods
with sentences from the training part of the STS Benchmark as calibration data. Printed is the rank
correlation of cosine similarities with those that people gave to the 1379 pairs of the test part:
.8203 for float32.

    python -m examples.minilm                              # what runs in minutes
    python -m examples.minilm --variants int3-g64 --json   # one row of the table
"""

import argparse
import json
import time

import jax
import numpy as np

import jaxopt_compress as jc
from examples.fetching import fetch
from examples.models import minilm

KERNELS = "**/kernel"
METHODS = {
    "nearest": jc.quantize,
    "squares": lambda *args, **given: jc.quantize(*args, bounds=jc.bounds.mse(), **given),
    "hqq": jc.hqq,
    "awq": jc.awq,
    "auto_round": jc.auto_round,
    "gptq": jc.gptq,
}
FORMATS = {
    f"{name}{'' if symmetric else '-zero'}{'' if size is None else f'-g{size}'}": (
        name,
        {"group_size": size, "symmetric": symmetric},
    )
    for name in ("int8", "int4", "int3", "int2")
    for size in (64, 128, None)
    for symmetric in (True, False)
} | {name: (name, {}) for name in ("nf4", "mxfp4")}
# Weights and activations.
BOTH = {
    "w8a8-nearest": lambda: jc.quantize("int8", where=KERNELS, activations="int8"),
    "w8a8-smooth": lambda: jc.smooth_quant(where=KERNELS),
    "w8a8-gptq": lambda: jc.gptq("int8", where=KERNELS, activations="int8"),
}
HELD = {"centroid_dtype": "float16", "iterations": 15}
# Few codes for vectors of inputs: 2 bits for each entry, and codebooks.
VECTORS = {
    "vectors-one": lambda: jc.share(256, "density", vector=4, where=KERNELS, **HELD),
    "vectors-sums": lambda: jc.share(256, "density", vector=8, codebooks=2, where=KERNELS, **HELD),
}
FEW = ("int8", "int4-g64", "int3-g64", "int3-zero-g64", "int2-zero-g64")


def variants(asked):
    """Name -> compression, of each format with each method, by prefix of ``format-method``."""
    found = BOTH | VECTORS
    for label, (name, given) in FORMATS.items():
        for method, make in METHODS.items():
            if method == "auto_round" and not name.startswith("int"):
                continue
            found[f"{label}-{method}"] = lambda make=make, name=name, given=given: make(
                name, where=KERNELS, **given
            )
    wanted = {f"{label}-{method}" for label in FEW for method in METHODS}
    wanted |= set(BOTH) | set(VECTORS)
    chosen = [n for n in found if (n in wanted if asked is None else _asked(n, asked))]
    return {name: found[name] for name in chosen}


def _asked(name, asked):
    return any(name == each or name.startswith(f"{each}-") for each in asked)


def calibration(tokenize, count):
    """Batches of sentences of the training part, ``count`` of them, each of one length."""
    batches = minilm.pairs(tokenize, "train")
    chosen = np.random.default_rng(0).choice(len(batches), count, replace=False)
    return [(np.concatenate(batches[i][0]),) for i in sorted(chosen)]


def main():
    """Prints a line per variant, or all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variants", nargs="*", help="such as int3-g64 or int3-g64-gptq")
    parser.add_argument("--batches", type=int, default=16, help="of 128 sentences, to calibrate")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    args = parser.parse_args()
    chosen = variants(args.variants)
    if not chosen:
        parser.error(f"no variant of {args.variants}; formats are {', '.join(FORMATS)}")

    folder = fetch("minilm")
    tokenize, params = minilm.tokenizer(folder), minilm.load(folder)
    seen = calibration(tokenize, args.batches)
    uses = jc.uses(minilm.apply, params, *seen[0])
    stats = jc.calibrate(minilm.apply, params, seen, where=KERNELS)
    test = minilm.pairs(tokenize)
    score = lambda p: jc.evaluate(minilm.similarity, p, test, ["spearman"])["spearman"]
    found = {"float32": {"spearman": score(params), "bytes": jc.nbytes(params), "seconds": 0.0}}
    _say("float32", found["float32"], args.json)
    for name, make in chosen.items():
        start = time.perf_counter()
        small = jc.compress(params, make(), uses=uses, stats=stats)
        jax.block_until_ready(jax.tree.leaves(small))
        seconds = time.perf_counter() - start
        # Dense weights are the same numbers, and one program serves them all.
        run = small if name in BOTH else jc.materialize(small)
        found[name] = {"spearman": score(run), "bytes": jc.nbytes(small), "seconds": seconds}
        _say(name, found[name], args.json)
    if args.json:
        print(json.dumps(found))


def _say(name, row, quiet):
    if not quiet:
        text = f"{name:24} {row['spearman']:.4f}  {row['bytes']:>11,} bytes"
        print(f"{text}  {row['seconds']:5.1f} s", flush=True)


if __name__ == "__main__":
    main()
