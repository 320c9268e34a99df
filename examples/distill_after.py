"""What distillation gives back after each kind of compression: before and after, at the same bytes.

The kernels of a model are compressed with calibration data and without training, in four ways. Then
`jc.distill` trains what is float in their stored form, such as scales, factors and kept entries, on
the same unlabelled inputs. Codes and masks stay, and so do the bytes. MiniLM is measured by the
rank correlation on the test part of the STS Benchmark, SmolLM2 by the perplexity of fiction, of
which nothing was calibrated or trained on.

    python -m examples.distill_after minilm
    python -m examples.distill_after smollm2 --batches 48 --steps 48
"""

import argparse
import time

import jax
from rich.console import Console
from rich.table import Table

import jaxopt_compress as jc
from examples import low_rank
from examples.results import Results

KERNELS = "**/kernel"
VARIANTS = {
    "int3 g64, nearest": jc.quantize("int3", 64, symmetric=False, where=KERNELS),
    "int2 g64, gptq": jc.gptq("int2", 64, symmetric=False, where=KERNELS),
    "2:4, SparseGPT": jc.sparse_gpt(0.5, "2:4", where=KERNELS),
    "80%, low rank": jc.low_rank(where=KERNELS, ratio=1 / 0.8, whiten=True),
    "8 values, share": jc.share(8, where=KERNELS),
}


def soft(got, want):
    """The mean divergence of next tokens."""
    return jc.distillation.soft_targets(got, want, 1.0).mean()


def main(argv=None):
    """Prints a line per kind of compression."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=("minilm", "smollm2"))
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--batches", type=int, default=16, help="to calibrate and train on")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--rate", type=float, default=3e-3, help="relative")
    parser.add_argument("--tokens", type=int, default=2048, help="to measure SmolLM2 on")
    parser.add_argument("--results", metavar="FILE", help="JSON of rows that runs before measured")
    args = parser.parse_args(argv)
    results = Results(args.results, {"model": args.model, "batches": args.batches})
    fn, params, seen, score = low_rank.loaded(args)
    uses = jc.uses(fn, params, *seen[0])
    stats = jc.calibrate(fn, params, seen, where=KERNELS)
    given = {"loss": soft} if args.model == "smollm2" else {}

    def measure(name):
        small = jc.compress(params, VARIANTS[name], uses=uses, stats=stats)
        row = {"before": score(jc.materialize(small)), "bytes": jc.nbytes(small)}
        start = time.perf_counter()
        better = jc.distill(
            *(fn, params, small, seen, ["**/kernel/**", "**/scale"]),
            steps=args.steps,
            rate=args.rate,
            progress=True,
            **given,
        )
        jax.block_until_ready(better)
        seconds = time.perf_counter() - start
        return row | {"after": score(jc.materialize(better)), "seconds": seconds}

    rows = {"float32": results.row("float32", lambda: {"before": score(params)})}
    for name in args.variants:
        label = f"{name}, {args.steps} steps of {args.rate}"
        rows[name] = results.row(label, lambda n=name: measure(n))
    table = Table(title=f"{args.model}: {args.steps} steps")
    for column in ("", "before", "after", "bytes", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        cells = [f"{row[k]:,.{d}f}" if k in row else "" for k, d in FORMS.items()]
        table.add_row(name, *cells)
    Console().print(table)
    return rows


FORMS = {"before": 4, "after": 4, "bytes": 0, "seconds": 0}

if __name__ == "__main__":
    main()
