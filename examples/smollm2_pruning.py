"""Half of a language model's weights become 0, or heads and channels leave it, without training.

SmolLM2-135M's 210 kernels are pruned after calibration on some categories of the Brown corpus; the
perplexity is that of the next tokens in its fiction, which no method has seen. `--remove` takes key
heads with their queries, and channels of the perceptrons, out of the function itself.

    python -m examples.smollm2_pruning --tokens 2048 --calibrate 8192     # some minutes per method
    python -m examples.smollm2_pruning --patterns --remove 0.1 0.2

References:
    Sun et al., 2024, A Simple and Effective Pruning Approach for Large Language Models. Frantar and
    Alistarh, 2023, SparseGPT. Boža, 2024, Fast and Effective Weight Update for Pruned Large
    Language Models.
"""

import argparse
import functools
import itertools
import json
import time

import jax
import numpy as np

import jaxopt_compress as jc
from examples.fetching import fetch
from examples.models import smollm2
from examples.smollm2 import CALIBRATED, KERNELS, texts
from jaxopt_compress.evaluation.timing import interleave

METHODS = ("magnitude", "wanda", "sparse_gpt", "magnitude+admm", "wanda+admm", "sparse_gpt+admm")
INT4 = ("sparse_gpt+gptq", "sparse_gpt+rounded")  # int4 in groups of 64 behind the zeros
UNITS = ("**/attention/**", "**/mlp/**")


def method(name, pattern):
    """The compression that a method's name says, to one half of the entries."""
    base, _, after = name.partition("+")
    if name in INT4:
        solve, int4 = (
            jc.sparse_gpt(0.5, pattern, where=KERNELS),
            {"group_size": 64, "where": KERNELS},
        )
        if after == "gptq":
            return jc.chain(solve, jc.gptq("int4", **int4))
        return jc.chain(solve, jc.quantize("int4", bounds=jc.bounds.mse(), **int4))
    if base == "sparse_gpt":
        return jc.sparse_gpt(0.5, pattern, where=KERNELS, rounds=20 if after else 0)
    score, half = getattr(jc.scores, base)(), jc.schedules.constant(0.5)
    prune = jc.prune(score, half, pattern, where=KERNELS)
    return jc.chain(prune, jc.reconstruct(where=KERNELS)) if after else prune


def errors(params, small, held_out):
    """The median over kernels of the relative error of their products on held-out inputs."""
    rows = jc.report(params, small, stats=held_out)["leaves"]
    return float(np.median([row["output_error"] for row in rows if row.get("output_error")]))


def pruned(params, patterns, methods, uses, stats, held_out, score):
    """Yields name -> figures of each variant."""
    for pattern in patterns:
        for name in methods:
            start = time.perf_counter()
            c = method(name, None if pattern == "50%" else pattern)
            small = jc.compress(params, c, uses=uses, stats=stats)
            jax.block_until_ready(jax.tree.leaves(small))
            seconds = time.perf_counter() - start
            row = {"perplexity": score(smollm2.apply, jc.materialize(small)), "seconds": seconds}
            row["error"] = errors(params, small, held_out)
            yield f"{pattern} {name}", row | {"bytes": jc.nbytes(small)}


def removed(params, shares, ids, stats, score, rounds):
    """Yields name -> figures of models without the units that matter least."""
    groups = jc.find_groups(smollm2.apply, params, ids)
    # Not the width, which all layers share.
    inner = [k for k, g in groups.items() if len({m.path.split("/")[1] for m in g.members}) == 1]
    scores = groups.scores(jc.scores.wanda(), stats=stats)
    scores = {name: scores[name] for name in inner if name.startswith("layers")}
    for share in shares:
        plan = groups.plan(budget=jc.flops(1 - share), scores=scores)
        rewrite = plan.rewrite()
        fn = rewrite.function(smollm2.apply)
        row = {"perplexity": score(fn, rewrite.params), "bytes": jc.nbytes(rewrite.params)}
        run = lambda fn, params: functools.partial(jax.jit(fn), params, ids)
        runs = {"whole": run(smollm2.apply, params), "small": run(fn, rewrite.params)}
        times = interleave(runs, rounds)
        pairs = zip(times["whole"].wall, times["small"].wall, strict=True)
        row["speed"] = float(np.median([a / b for a, b in pairs]))
        row["flops"] = plan.flops[1] / plan.flops[0]
        yield f"{share:.0%} removed", row


def main():
    """Prints the figures of each variant as it is there."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--patterns", nargs="*", default=["50%", "2:4"])
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS + INT4)
    parser.add_argument("--remove", type=float, nargs="*", default=[], help="shares of operations")
    parser.add_argument("--tokens", type=int, default=2048, help="to measure")
    parser.add_argument("--calibrate", type=int, default=8192, help="tokens to calibrate on")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    args = parser.parse_args()

    folder = fetch("smollm2")
    params, tokenize = smollm2.load(folder), smollm2.tokenizer(folder)
    test = texts(tokenize, ["fiction"], args.tokens)
    share = args.calibrate // len(CALIBRATED)
    seen = [(ids,) for ids, _ in texts(tokenize, CALIBRATED, share)]
    uses = jc.uses(smollm2.apply, params, *seen[0])
    stats = jc.calibrate(smollm2.apply, params, seen, where=KERNELS)
    held_out = jc.calibrate(smollm2.apply, params, [(test[0][0],)], where=KERNELS)
    score = lambda fn, p: jc.evaluate(fn, p, test, ["perplexity"])["perplexity"]
    found = {"float32": {"perplexity": score(smollm2.apply, params)}}
    _say("float32", found["float32"], args.json)
    given = params, args.patterns, args.methods, uses, stats, held_out, score
    small = removed(params, args.remove, seen[0][0], stats, score, args.rounds)
    for name, row in itertools.chain(pruned(*given), small):
        found[name] = row
        _say(name, row, args.json)
    if args.json:
        print(json.dumps(found))


def _say(name, row, quiet):
    if not quiet:
        rest = "  ".join(f"{k} {v:,.4g}" for k, v in row.items())
        print(f"{name:24} {rest}", flush=True)


if __name__ == "__main__":
    main()
