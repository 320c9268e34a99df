"""Compresses a language model without training: all layers at once, or one behind the other.

SmolLM2-135M's 210 kernels are rounded to 3 or 2 bits in groups of 64. Calibrated is on some
categories of the Brown corpus, and measured the perplexity of the next tokens in its fiction. GPTQ
decides on statistics of the float model, or, in order, on those that the compressed layers before
each one produce. Runs take from minutes to an hour on a CPU, by the number of tokens.

    python -m examples.smollm2 --formats int3 --tokens 2048 --calibrate 4096
"""

import argparse
import json
import math
import time

import jax
import numpy as np

import jaxopt_compress as jc
from examples.fetching import fetch
from examples.models import smollm2

KERNELS = "**/kernel"
CALIBRATED = ("lore", "government", "romance", "hobbies")
LENGTH = 256
METHODS = ("nearest", "squares", "gptq", "gptq-in-order")


def method(name, bits, symmetric, activations=None):
    """The compression that a method's name says."""
    given = {"group_size": 64, "symmetric": symmetric, "where": KERNELS, "activations": activations}
    if name.startswith("gptq"):
        return jc.gptq(bits, **given)
    bounds = jc.bounds.mse() if name == "squares" else None
    return jc.quantize(bits, bounds=bounds, **given)


def rotated(fn, params, ids, way):
    """All that kernels read, rotated at run time; or the residual stream, in the weights."""
    where = KERNELS
    if way == "stream":
        stream = jc.rotate(fn, params, ids)
        fn, params = stream.function(fn), stream.params
        where = ["**/down/kernel", "**/output/kernel"]
    inputs = jc.rotate_inputs(fn, params, ids, where=where)
    return inputs.function(fn), inputs.params


def texts(tokenize, categories, tokens):
    """Batches of ``tokens`` tokens of each category."""
    count = max(1, tokens // LENGTH)
    return [
        batch
        for category in categories
        for batch in smollm2.windows(tokenize, category, count, LENGTH, size=1)
    ]


def main():
    """Prints the perplexity of each variant, and which part of the loss of rounding it undoes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--formats", nargs="*", default=["int3", "int2"])
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--asymmetric", action="store_true", help="grids with a zero point")
    parser.add_argument("--activations", help="round activations too, such as int8")
    parser.add_argument("--rotate", choices=["stream", "inputs"], help="rotate before")
    parser.add_argument("--tokens", type=int, default=8192, help="to measure")
    parser.add_argument("--calibrate", type=int, default=16384, help="tokens to calibrate on")
    parser.add_argument("--resume", help="a folder for what compress_in_order decided")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    args = parser.parse_args()

    folder = fetch("smollm2")
    params, tokenize = smollm2.load(folder), smollm2.tokenizer(folder)
    test = texts(tokenize, ["fiction"], args.tokens)
    share = args.calibrate // len(CALIBRATED)
    seen = [(ids,) for ids, _ in texts(tokenize, CALIBRATED, share)]
    apply = smollm2.apply
    if args.rotate:
        apply, params = rotated(apply, params, *seen[0], args.rotate)
    uses, stats = jc.uses(apply, params, *seen[0]), None
    if any(name.startswith("gptq") for name in args.methods):
        stats = jc.calibrate(apply, params, seen, where=KERNELS)
    score = lambda p: jc.evaluate(apply, p, test, ["perplexity"])["perplexity"]
    found = {"float32": {"perplexity": score(params), "seconds": 0.0, "undone": None}}
    _say("float32", found["float32"], args.json)
    for bits in args.formats:
        for name in args.methods:
            c, start = (
                method(name, bits, not args.asymmetric, args.activations),
                time.perf_counter(),
            )
            if name == "gptq-in-order":
                resume = args.resume and f"{args.resume}/{bits}"
                small = jc.compress_in_order(
                    apply, params, c, seen, uses=uses, resume=resume, progress=False
                )
            else:
                small = jc.compress(params, c, uses=uses, stats=stats)
            jax.block_until_ready(jax.tree.leaves(small))
            seconds = time.perf_counter() - start
            # Weights alone say the same when they are dense, in less time.
            own = small if args.activations else jc.materialize(small)
            row = {"perplexity": score(own), "seconds": seconds}
            row["undone"] = _undone(found, f"{bits}-nearest", row["perplexity"])
            found[f"{bits}-{name}"] = row
            _say(f"{bits}-{name}", row, args.json)
    if args.json:
        print(json.dumps(found))


def _undone(found, nearest, perplexity):
    """Which part of the loss of log-perplexity by rounding to the nearest a method undoes."""
    if nearest not in found:
        return None
    best, worst = (math.log(found[n]["perplexity"]) for n in ("float32", nearest))
    return float(np.divide(worst - math.log(perplexity), worst - best))


def _say(name, row, quiet):
    if not quiet:
        undone = "" if row["undone"] is None else f"  {row['undone']:6.1%} undone"
        print(f"{name:22} {row['perplexity']:10.2f}  {row['seconds']:6.0f} s{undone}", flush=True)


if __name__ == "__main__":
    main()
