"""Compresses a language model without training: all layers at once, or one behind the other.

SmolLM2-135M's 210 kernels are rounded, to 3 or 2 bits in groups of 64 for the most. Calibrated is
on some categories of the Brown corpus, and measured the perplexity of the next tokens in its
fiction. Methods with data decide on statistics of the float model, or, in order, on those that the
compressed layers before each one produce. A file of results lets several runs fill one table; a row
takes from one minute to half an hour on a CPU, by the number of tokens.

    python -m examples.smollm2 --formats int3 int3-zero --methods nearest gptq --tokens 2048
    python -m examples.smollm2 --methods gptq-in-order --rotate inputs --results out.json
"""

import argparse
import functools
import math
import time

import jax

import jaxopt_compress as jc
from examples.fetching import fetch
from examples.models import smollm2
from examples.results import Results

KERNELS = "**/kernel"
CALIBRATED = ("lore", "government", "romance", "hobbies")
LENGTH = 256
FORMATS = [f"int{bits}{zero}" for bits in (8, 4, 3, 2) for zero in ("", "-zero")]
IN_ORDER = "-in-order"
WITHOUT_DATA = ("nearest", "squares", "hqq")
WITH_DATA = ("awq", "auto_round", "gptq", "corrected", "smooth_quant")
METHODS = (*WITHOUT_DATA, *WITH_DATA, *(name + IN_ORDER for name in WITH_DATA))
MEASURES = (jc.measures.moments(), jc.measures.means(), jc.measures.ranges())


def method(name, format, args):
    """The compression that a method's and a format's name say; ``-zero`` is a zero point."""
    bits, zero, _ = format.partition("-zero")
    given = {"group_size": args.group or None, "symmetric": not zero, "where": KERNELS}
    given["scale_dtype"] = args.scales
    # Weights that read the same activations then have the same factors.
    if args.fold and name in ("awq", "smooth_quant"):
        given |= {"alpha": 0.5}
    if args.activations:
        given["activations"] = args.activations
    name = name.removesuffix(IN_ORDER)
    if name == "corrected":
        solver = jc.gptq(bits, damping=args.damping, **given)
        return jc.low_rank_correction(solver, args.rank, whiten=True)
    if name == "gptq":
        return jc.gptq(bits, damping=args.damping, **given)
    if name in ("nearest", "squares"):
        bounds = jc.bounds.mse() if name == "squares" else None
        return jc.quantize(bits, bounds=bounds, **given)
    return getattr(jc, name)(bits, **given)


def rotated(fn, params, ids, way):
    """All that kernels read, rotated at run time; or the residual stream, in the weights.

    Returns:
        The function, its parameters, and what makes them parameters of ``fn`` again.
    """
    where, back = KERNELS, jc.materialize
    if way == "stream":
        stream = jc.rotate(fn, params, ids)
        fn, params = stream.function(fn), stream.params
        where = ["**/down/kernel", "**/output/kernel"]
        back = lambda small: stream.undo(jc.materialize(small))
    inputs = jc.rotate_inputs(fn, params, ids, where=where)
    return inputs.function(fn), inputs.params, lambda small: back(inputs.undo(small))


def texts(tokenize, categories, tokens):
    """Batches of ``tokens`` tokens of each category."""
    count = max(1, tokens // LENGTH)
    return [
        batch
        for category in categories
        for batch in smollm2.windows(tokenize, category, count, LENGTH, size=1)
    ]


def arguments(argv):
    """What the command was given."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--formats", nargs="*", default=["int3", "int2-zero"], choices=FORMATS)
    parser.add_argument("--methods", nargs="*", default=["nearest", "gptq"], choices=METHODS)
    parser.add_argument("--group", type=int, default=64, help="their size; 0: none")
    parser.add_argument("--activations", help="round activations too, such as int8")
    parser.add_argument("--scales", metavar="DTYPE", help="of the scales, such as bfloat16")
    parser.add_argument("--damping", type=float, default=0.01, help="of gptq")
    parser.add_argument("--rank", type=int, default=32, help="of corrections")
    parser.add_argument("--rotate", choices=["stream", "inputs"], help="rotate before")
    parser.add_argument("--smooth", action="store_true", help="move ranges of activations before")
    parser.add_argument("--fold", action="store_true", help="fold scales of awq, smooth_quant")
    parser.add_argument("--tune", type=int, default=0, help="steps of distilling into scales")
    parser.add_argument("--rate", type=float, default=3e-3, help="of that training, relative")
    parser.add_argument("--tokens", type=int, default=2048, help="to measure")
    parser.add_argument("--calibrate", type=int, default=4096, help="tokens to calibrate on")
    parser.add_argument("--resume", help="a folder for what was decided and learned")
    parser.add_argument("--results", metavar="FILE", help="JSON of rows that runs before measured")
    return parser.parse_args(argv)


def main(argv=None):
    """Prints the perplexity of each variant, and which part of the loss of rounding it undoes."""
    args = arguments(argv)
    results = Results(args.results, {"tokens": args.tokens})
    folder = fetch("smollm2")
    params, tokenize = smollm2.load(folder), smollm2.tokenizer(folder)
    test = texts(tokenize, ["fiction"], args.tokens)
    seen = [(i,) for i, _ in texts(tokenize, CALIBRATED, args.calibrate // len(CALIBRATED))]
    score = lambda fn, p: jc.evaluate(fn, p, test, ["perplexity"])["perplexity"]
    whole = lambda p=params: {"perplexity": score(smollm2.apply, p), "bytes": jc.nbytes(p)}
    say("float32", results.row("float32", whole), results.rows)
    fn, original = smollm2.apply, jc.materialize
    if args.rotate:
        fn, params, original = rotated(fn, params, *seen[0], args.rotate)
    if args.smooth:
        ranges = jc.calibrate(fn, params, seen, where=KERNELS, measures=(jc.measures.ranges(),))
        params = jc.smooth(fn, params, *seen[0], stats=ranges).params
    uses = jc.uses(fn, params, *seen[0])

    @functools.cache
    def stats():
        return jc.calibrate(fn, params, seen, where=KERNELS, measures=MEASURES)

    def measure(format, name):
        start = time.perf_counter()
        c = method(name, format, args)
        resume = args.resume and f"{args.resume}/{format}-{name}"
        if name.endswith(IN_ORDER):
            small = jc.compress_in_order(
                fn, params, c, seen, uses=uses, resume=resume, progress=False
            )
        else:
            known = None if name in WITHOUT_DATA else stats()
            small = jc.compress(params, c, uses=uses, stats=known)
        if args.fold:
            small = jc.fold_scales(fn, small, *seen[0]).params
        if args.tune:
            small = jc.distill(
                *(fn, params, small, seen, "**/scale"),
                loss=lambda got, want: jc.distillation.soft_targets(got, want, 1.0).mean(),
                steps=args.tune,
                rate=args.rate,
                resume=resume and f"{resume}-tuned",
                progress=True,
            )
        jax.block_until_ready(jax.tree.leaves(small))
        seconds = time.perf_counter() - start
        # Weights alone say the same when they are dense, and one program serves them all.
        own = (fn, small) if args.activations else (smollm2.apply, original(small))
        return {"perplexity": score(*own), "bytes": jc.nbytes(small), "seconds": seconds}

    for format in args.formats:
        for name in args.methods:
            label = row_name(args, format, name)
            row = results.row(label, lambda f=format, n=name: measure(f, n))
            say(label, row, results.rows)
    return results.rows


def row_name(args, format, name):
    """What a row is called; some methods need no tokens."""
    words = [f"{format} g{args.group}" if args.group else format, name]
    words += [f"activations {args.activations}"] if args.activations else []
    words += [f"{args.scales} scales"] if args.scales else []
    if name.startswith(("gptq", "corrected")) and args.damping != 0.01:
        words += [f"damping {args.damping}"]
    words += [f"rank {args.rank}"] if name.startswith("corrected") else []
    words += [f"{args.rotate} rotated"] if args.rotate else []
    words += ["smoothed"] if args.smooth else []
    words += ["folded"] if args.fold else []
    words += [f"{args.tune} steps of {args.rate}"] if args.tune else []
    words += [] if name in WITHOUT_DATA else [f"{args.calibrate} tokens"]
    return ", ".join(words)


def say(name, row, rows):
    """Prints a row: with the part of the loss in log-perplexity by rounding that it undoes."""
    worst = rows.get(f"{name.split(',')[0].replace('-zero', '')}, nearest")
    text = f"{name:48} {row['perplexity']:10.2f}  {row['bytes']:>11,} bytes"
    if worst and worst is not row:
        best, worst, own = (math.log(r["perplexity"]) for r in (rows["float32"], worst, row))
        text += f"  {(worst - own) / (worst - best):6.1%} undone"
    print(text, flush=True)


if __name__ == "__main__":
    main()
