"""Cuts the residual stream of a language model: to principal directions, or by magnitude.

SmolLM2-135M's stream has 576 channels. They are rotated to the principal directions of what layers
read, and the last ones leave all parameters, and the function. Beside it, channels of the least
magnitude go, without a rotation. The table of tokens is the last layer too: with ``--untied`` that
is a parameter of its own, so that the last norm's scale can be folded into it. Measured is the
perplexity of fiction of the Brown corpus; calibrated is on other categories. Nothing is trained.

    python -m examples.slice_stream --tokens 2048 --calibrate 4096

References:
    Ashkboos et al., 2024, SliceGPT: Compress Large Language Models by Deleting Rows and Columns.
"""

import argparse
import json
import time

import jax
import numpy as np

import jaxopt_compress as jc
from examples import smollm2 as language
from examples.fetching import fetch
from examples.models import smollm2
from examples.models.common import run_layers

STREAM = "tokens/embedding:1"


def untied(params, ids):
    """Logits as of `smollm2.apply`, by a last layer of its own."""
    x = run_layers(smollm2.block, params["layers"], params["tokens"]["embedding"][ids])
    return smollm2.rms_norm(params["norm"], x) @ params["head"]["kernel"]


def by_magnitude(fn, params, ids, keep):
    """The rewrite that removes the channels of the stream with the least magnitudes."""
    groups = jc.find_groups(fn, params, ids)
    scores = np.asarray(groups.scores(jc.scores.magnitude())[STREAM])
    gone = np.argsort(scores)[: len(scores) - round(keep * len(scores))]
    return groups.plan({STREAM: gone.tolist()}).rewrite()


def main(argv=None):
    """Prints the perplexity and the bytes for each share of channels that goes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--removed", nargs="*", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--tokens", type=int, default=2048, help="to measure")
    parser.add_argument("--calibrate", type=int, default=4096, help="tokens to calibrate on")
    parser.add_argument("--untied", action="store_true", help="a last layer of its own")
    parser.add_argument("--layers", type=int, help="only the first ones, to try it")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    args = parser.parse_args(argv)
    folder = fetch("smollm2")
    params, tokenize = smollm2.load(folder), smollm2.tokenizer(folder)
    params["layers"] = params["layers"][: args.layers]
    fn = smollm2.apply
    if args.untied:
        fn = untied
        params["head"] = {"kernel": params["tokens"]["embedding"].T}
    test = language.texts(tokenize, ["fiction"], args.tokens)
    share = args.calibrate // len(language.CALIBRATED)
    seen = [(ids,) for ids, _ in language.texts(tokenize, language.CALIBRATED, share)]
    score = lambda fn, p: jc.evaluate(fn, p, test, ["perplexity"])["perplexity"]
    found = {}

    def say(name, fn, params, start):
        row = {"perplexity": score(fn, params), "bytes": jc.nbytes(params)}
        row["seconds"] = time.perf_counter() - start
        found[name] = row
        if not args.json:
            text = f"{name:24} {row['perplexity']:14.2f} {row['bytes']:12,} bytes"
            print(f"{text} {row['seconds']:6.0f} s", flush=True)

    say("float32", fn, params, time.perf_counter())
    # Readers of one place have the same inputs: queries and gates stand for the others.
    where = ["**/query/kernel", "**/gate/kernel"]
    stats = jc.calibrate(fn, params, seen, where=where)
    for removed in args.removed:
        for name in ("principal", "magnitude"):
            start = time.perf_counter()
            if name == "principal":
                rw = jc.slice_stream(fn, params, *seen[0], stats=stats, keep=1 - removed)
            else:
                rw = by_magnitude(fn, params, *seen[0], 1 - removed)
            jax.block_until_ready(jax.tree.leaves(rw.params))
            say(f"{removed:.0%} {name}", rw.function(fn), rw.params, start)
    if args.json:
        print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
