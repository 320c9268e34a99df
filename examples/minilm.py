"""Compresses MiniLM without training, and measures what each way to round costs.

all-MiniLM-L6-v2 turns sentences into vectors. Its 36 kernels are rounded to few bits, some methods
with sentences from the training part of the STS Benchmark as calibration data. Printed is the rank
correlation of cosine similarities with those that people gave to the 1379 pairs of the test part:
.8203 for float32. A format is a column of the table, a method a row, and a file of results lets
several runs fill it:

    python -m examples.minilm --cells "int4-g64, *" "*, hqq" --results minilm.json
    python -m examples.minilm --results minilm.json     # all the others
"""

import argparse
import fnmatch
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxopt_compress as jc
from examples.fetching import fetch
from examples.models import minilm
from examples.results import Results, show

KERNELS = "**/kernel"
METHODS = {
    "nearest": jc.quantize,
    "squares": functools.partial(jc.quantize, bounds=jc.bounds.mse()),
    "percentile": functools.partial(jc.quantize, bounds=jc.bounds.percentile(99.9)),
    "hqq": jc.hqq,
    "awq": jc.awq,
    "smooth_quant": jc.smooth_quant,
    "auto_round": jc.auto_round,
    "gptq": jc.gptq,
    "rotated nearest": jc.quantize,
    "rotated gptq": jc.gptq,
    "learned nearest": jc.quantize,
    "learned gptq": jc.gptq,
    "share": functools.partial(jc.share, centroid_dtype="float16", iterations=15),
}
WITHOUT_DATA = ("nearest", "percentile", "squares", "hqq", "rotated nearest", "learned nearest")
_zero = {"symmetric": False}
# What methods are given; "w4a8" rounds weights to 4 bits and activations to 8.
FORMATS = {
    "int8": {"format": "int8"},
    **{f"int4{n}": {"format": "int4", "group_size": g} for n, g in (("-g64", 64), ("-g128", 128))},
    "int4": {"format": "int4"},
    **{
        f"{bits}-zero-g{size}": {"format": bits, "group_size": size, **_zero}
        for bits in ("int3", "int2")
        for size in (64, 128)
    },
    "int3": {"format": "int3"},
    "int2-zero": {"format": "int2", **_zero},
    "nf4-g64": {"format": "nf4", "group_size": 64},
    "mxfp4": {"format": "mxfp4"},
    "w8a8": {"format": "int8", "activations": "int8"},
    "w4a8-g64": {"format": "int4", "group_size": 64, "activations": "int8"},
    "w4a8": {"format": "int4", "activations": "int8"},
    # 2 bits for each entry in the place of a format: codebooks of vectors, and sums of two.
    "vectors-one": {"format": 256, "init": "density", "vector": 4},
    "vectors-sums": {"format": 256, "init": "density", "vector": 8, "codebooks": 2},
}


class Model(NamedTuple):
    """Parameters with what methods need to know of them; statistics are measured when asked for."""

    params: Any
    uses: Any
    stats: Callable[[], Any]
    original: Callable[[Any], Any]


def observed(fn, params, seen, original=lambda params: params):
    """``params`` with uses and statistics; ``original`` makes them those of the plain function."""
    stats = functools.cache(lambda: jc.calibrate(fn, params, seen, where=KERNELS))
    return Model(params, jc.uses(fn, params, *seen[0]), stats, original)


def rotated(params, seen):
    """The kernels, rotated along what they sum over."""
    rw = jc.rotate_inputs(minilm.apply, params, *seen[0], where=KERNELS)
    return observed(rw.function(minilm.apply), rw.params, seen, rw.undo)


def calibration(tokenize, count):
    """Batches of sentences of the training part, ``count`` of them, each of one length."""
    batches = minilm.pairs(tokenize, "train")
    chosen = np.random.default_rng(0).choice(len(batches), count, replace=False)
    return [(np.concatenate(batches[i][0]),) for i in sorted(chosen)]


def learned(params, small, seen, rows=32):
    """Codes chosen anew on the grid of ``small``, all together, by the vectors of few sentences."""
    whole = [ids[(ids > 0).any(1)] for (ids,) in seen]
    batches = [(ids[:rows],) for ids in whole if len(ids) >= rows]
    return jc.learn_rounding(minilm.apply, params, small, batches)


def fits(format, method):
    """Whether a method takes a format."""
    given = FORMATS[format]
    if "vector" in given or method == "share":
        return "vector" in given and method == "share"
    both = "activations" in given
    if method.startswith("learned"):
        return given["format"].startswith("int") and not both
    refused = {
        "smooth_quant": not both,
        "awq": both,
        "hqq": format == "mxfp4",
        "auto_round": not given["format"].startswith("int"),
    }
    return not refused.get(method, False)


def cells(globs):
    """Name -> format and method, of those that go together, in the order of the globs."""
    every = {f"{f}, {m}": (f, m) for f, m in itertools.product(FORMATS, METHODS) if fits(f, m)}
    return {name: every[name] for glob in globs for name in fnmatch.filter(every, glob)}


def main(argv=None):
    """Measures the cells that are asked for, and prints all that the results hold."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cells", nargs="*", default=["*"], help="globs of 'FORMAT, METHOD'")
    parser.add_argument("--batches", type=int, default=16, help="of 128 sentences, to calibrate")
    parser.add_argument("--results", metavar="FILE", help="JSON of cells that runs before measured")
    args = parser.parse_args(argv)
    chosen = cells(args.cells)
    if not chosen:
        parser.error(f"no cell of {args.cells}; there are {', '.join(cells(['*']))}")

    results = Results(args.results, {"batches": args.batches})
    folder = fetch("minilm")
    tokenize, params = minilm.tokenizer(folder), minilm.load(folder)
    seen = calibration(tokenize, args.batches)
    test = minilm.pairs(tokenize)
    plain = functools.cache(lambda: observed(minilm.apply, params, seen))
    turned = functools.cache(lambda: rotated(params, seen))

    def score(given):
        found = jc.evaluate(minilm.similarity, given, test, ["spearman"])["spearman"]
        return {"spearman": found, "bytes": jc.nbytes(given)}

    def measure(format, method):
        model = turned() if method.startswith("rotated") else plain()
        given = {"where": KERNELS} | FORMATS[format]
        start = time.perf_counter()
        c = METHODS[method](given.pop("format"), **given)
        stats = None if method in WITHOUT_DATA else model.stats()
        small = jc.compress(model.params, c, uses=model.uses, stats=stats)
        if method.startswith("learned"):
            small = learned(model.params, small, seen)
        jax.block_until_ready(jax.tree.leaves(small))
        seconds = time.perf_counter() - start
        # Dense weights are the same numbers, and one program serves them all.
        run = model.original(small)
        row = score(run if "activations" in given else jc.materialize(run))
        return row | {"bytes": jc.nbytes(small), "seconds": seconds}

    say("float32", results.row("float32", lambda: score(params)))
    for name, cell in chosen.items():
        say(name, results.row(name, lambda cell=cell: measure(*cell)))
    table(results.rows)
    return results.rows


def table(rows):
    """Prints a line per method and a column per format."""
    formats = [f for f in FORMATS if any(name.startswith(f"{f}, ") for name in rows)]
    cell = lambda f, m: rows.get(f"{f}, {m}")
    lines = {
        m: ["" if cell(f, m) is None else f"{cell(f, m)['spearman']:.4f}" for f in formats]
        for m in METHODS
        if any(cell(f, m) for f in formats)
    }
    show(f"float32: {rows['float32']['spearman']:.4f}", formats, lines)


def say(name, row):
    """Prints what one cell holds."""
    print(f"{name:28} {row['spearman']:.4f}  {row['bytes']:>11,} bytes", flush=True)


if __name__ == "__main__":
    main()
