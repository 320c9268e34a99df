"""Bits where they matter: mixed recipes beside uniform ones of the same bytes.

Each weight may have 2, 3, 4 or 8 bits: of MiniLM and SmolLM2 in groups of 64, of EfficientNet per
channel. What each choice costs is estimated from gradients and measured on held-out batches: for
MiniLM how far vectors of sentences move, which needs no labels, for SmolLM2 the loss of next tokens
of romances, for EfficientNet the squared error by which its layer for clothes was fitted. Then
budgets of the bytes that uniform bits take are given to the solver, and all are compared on test
data: the rank correlation of the STS Benchmark, perplexity of fiction, and accuracy.

    python -m examples.allocation minilm [--count 256] [--measured 2] [--json]
    python -m examples.allocation minilm --loss pairs --beside int3 --bits 3
    python -m examples.allocation smollm2 --count 16 --measured 1 --bits 3 --beside int3
    python -m examples.allocation smollm2 --method gptq --count 64 --measured 0 --bits 3
    python -m examples.allocation efficientnet --count 128 --measured 2 --bits 4

With ``--loss pairs`` it is how far the similarities of sentence pairs are from a linear function of
those before, since a rank correlation sees no shift and no scale; with ``--beside`` all other
weights are rounded while one is measured.
"""

import argparse
import json
import sys
import time

from rich.console import Console
from rich.table import Table

import jaxopt_compress as jc
from examples.allocation_cases import CASES, LOSSES

METHODS = {"nearest": jc.quantize, "gptq": jc.gptq}


def arguments(argv):
    """What the command was given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=list(CASES))
    parser.add_argument("--count", type=int, default=256, help="sentences, windows or pictures")
    parser.add_argument("--measured", type=int, default=2, help="candidates of each weight")
    parser.add_argument("--method", choices=list(METHODS), default="nearest")
    parser.add_argument("--loss", choices=list(LOSSES), default="moved", help="of minilm")
    parser.add_argument("--beside", choices=["int2", "int3", "int4"], help="of all other weights")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4], help="budgets")
    parser.add_argument("--resume", help="a file that keeps measurements")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if args.method == "gptq" and args.model == "minilm":
        parser.error("the table of words meets no activations: gptq is for the other models")
    return args


def main(argv=None):
    """Compares recipes of the same bytes."""
    args = arguments(argv)
    extra = {"loss": args.loss} if args.model == "minilm" else {}
    case = CASES[args.model](args.count, METHODS[args.method], **extra)
    inputs = case.test[0][0]
    uses = jc.uses(case.fn, case.params, *(inputs if isinstance(inputs, tuple) else (inputs,)))
    seen = [batch[:1] for batch in case.batches] if args.method == "gptq" else []
    stats = jc.calibrate(case.fn, case.params, seen, where=case.where) if seen else None
    start = time.perf_counter()
    table = jc.sensitivities(
        case.loss,
        case.params,
        case.candidates,
        case.batches,
        held_out=case.held_out,
        beside=case.candidates.get(args.beside),
        uses=uses,
        stats=stats,
        measured=args.measured,
        resume=args.resume,
        progress=True,
    )
    seconds = time.perf_counter() - start
    found = {}

    def show(name, small, **more):
        # Weights alone say the same when they are dense, and one program serves them all.
        quality = jc.evaluate(case.fn, jc.materialize(small), case.test, [case.metric])
        found[name] = {"bytes": jc.nbytes(small), case.metric: quality[case.metric], **more}
        print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)

    show("float32", case.params, seconds=seconds)
    for bits in args.bits:
        uniform = f"int{bits}"
        show(uniform, jc.compress(case.params, case.candidates[uniform], uses=uses, stats=stats))
        recipe = jc.allocate(table, jc.bytes(found[uniform]["bytes"] / table.dense_bytes))
        counts = {name: list(recipe.choices.values()).count(name) for name in case.candidates}
        small = jc.compress(case.params, recipe, uses=uses, stats=stats)
        show(f"allocated, bytes of {uniform}", small, weights=counts)
    if args.json:
        print(json.dumps(found))
        return found
    shown = Table(title=f"{args.model}: measured in {seconds:.0f} s")
    for column in ("recipe", "bytes", case.metric, "weights of 2, 3, 4, 8 bits"):
        shown.add_column(column, justify="left" if column == "recipe" else "right")
    for name, row in found.items():
        counts = " ".join(map(str, row.get("weights", {}).values()))
        shown.add_row(name, f"{row['bytes']:,}", f"{row[case.metric]:.4f}", counts)
    Console().print(shown)
    return found


if __name__ == "__main__":
    main()
