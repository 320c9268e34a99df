r"""LeNet-300-100, LeNet-5 and a small MLP on MNIST, pruned while they are trained.

Each run trains for the same number of epochs with Adam and one cosine cycle, on images that are
shifted by up to one pixel at random. Seeds are trained at once, by `jax.vmap` over parameters and
optimizer states; those of LeNet-5, whose convolutions are slow so on CPUs, one after the other.
Figures are those of the stored form (kept float32 weights and where they go; biases whole) on the
10000 test images.

    dense      nothing is pruned
    gradual    by magnitude, along a cubic schedule; layers share the sparsity by Erdős-Rényi-kernel
    global     the same, one threshold for all layers
    rigl       sparse from the start: the smallest weights go, those with the largest gradients come
    set        sparse from the start: the smallest weights go, others come by chance
    l0         each weight has a random gate, and open gates cost; how many, training finds
    variational  each weight has noise of a learned size, and goes where it is all noise; likewise
    polynomial by magnitude, along a cubic schedule from step 0 to step 1000
    tickets    five rounds of training; masks by magnitude, the rest rewound to early weights

After a method, ``+int8`` rounds weights to int8 once it has trained, and ``+qat`` while it trains.
With ``--pretrain``, what becomes sparse starts from weights that were trained for so many epochs;
``--distil 0.5`` lets it learn half from their logits, half from labels.

    python -m examples.mnist_pruning --out results.json --resume --plot results.svg
    python -m examples.mnist_pruning --model LeNet-5 --methods global --sparsities 0.99 --seeds 0
    python -m examples.mnist_pruning --model MLP-128 --pretrain 8 --epochs 4 --sparsities 0.5 \
        --methods dense dense+int8 polynomial polynomial+int8 polynomial+qat
    python -m examples.mnist_pruning --methods l0 --penalty 10 --out l0-10.json
    python -m examples.mnist_pruning --quick                             # a minute, to see it run

References:
    Zhu and Gupta, 2017, To Prune, or Not to Prune. Evci et al., 2020, Rigging the Lottery. Mocanu
    et al., 2018, Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity.
    Frankle et al., 2020, Linear Mode Connectivity and the Lottery Ticket Hypothesis. Louizos et
    al., 2018, Learning Sparse Neural Networks through L0 Regularization. Molchanov et al., 2017,
    Variational Dropout Sparsifies Deep Neural Networks.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import jaxopt_compress as jc
from examples import mnist_training
from examples.data import mnist
from examples.mnist_training import tickets, train
from examples.models import lenet
from examples.models.lenet import WEIGHTS
from examples.models.training import batches
from jaxopt_compress.extras import require

MODELS = {**lenet.MODELS, "MLP-128": (lenet.init_128, lenet.apply_128)}
GRID = ("dense", "gradual", "global", "rigl", "set", "l0", "variational")
METHODS = (*GRID, "polynomial", "tickets")
APART = ("LeNet-5",)
FROM_DENSE = ("gradual", "global", "polynomial")
PENALTIES = {"l0": 0.1, "variational": 1.0}  # over the number of images, as in the papers
FIGURES = ("accuracy", "precision_macro", "recall_macro", "f1_macro")
SETTINGS = ("epochs", "pretrain", "distil", "penalty", "images")
EVERY, GATES_RATE = 50, 3e-2


class Run(NamedTuple):
    """What is asked for, beside method and sparsity; ``out`` names the files of dense weights."""

    name: str
    data: Any
    settings: dict[str, Any]
    progress: Progress
    out: Path | None

    @property
    def steps(self) -> Callable[[int], int]:
        """Epochs to steps."""
        return lambda epochs: epochs * (self.settings["images"] // mnist_training.BATCH)


def compression(method, sparsity, steps):
    """How a method prunes within so many steps; None for no compression."""
    base, _, rounding = method.partition("+")
    c, int8 = pruning(base, sparsity, steps), jc.quantize("int8", where=WEIGHTS)
    if rounding != "qat":
        return c
    return int8 if c is None else jc.chain(c, int8)


def pruning(method, sparsity, steps):
    """The same without rounding."""
    score, erk = jc.scores.magnitude(), jc.distributions.erk()
    rising = jc.schedules.polynomial(sparsity, begin=steps // 20, end=steps * 2 // 5, every=EVERY)
    fixed = jc.schedules.constant(sparsity, every=EVERY, end=steps * 3 // 4)
    share = optax.cosine_decay_schedule(0.3, steps * 3 // 4)
    start = jc.scores.random(jax.random.key(1))
    return {
        "l0": lambda: jc.hard_concrete(jax.random.key(3), WEIGHTS),
        "variational": lambda: jc.variational_dropout(jax.random.key(3), WEIGHTS),
        "dense": lambda: None,
        "gradual": lambda: jc.prune(score, rising, where=WEIGHTS, distribution=erk),
        "global": lambda: jc.prune(score, rising, where=WEIGHTS, scope="global"),
        "polynomial": lambda: jc.prune(
            score, jc.schedules.polynomial(sparsity, begin=0, end=1000, every=EVERY), where=WEIGHTS
        ),
        "rigl": lambda: jc.prune(
            score,
            fixed,
            where=WEIGHTS,
            distribution=erk,
            grow=jc.grow.by_gradient(share, start=start),
        ),
        "set": lambda: jc.prune(
            score,
            fixed,
            where=WEIGHTS,
            distribution=erk,
            grow=jc.grow.random(jax.random.key(2), share, start=start),
        ),
    }[method]()


def dense_start(run, seeds):
    """Parameters that were trained dense, of each seed; kept beside the results."""
    init, apply = MODELS[run.name]
    fresh = jax.vmap(init)(jnp.stack([jax.random.key(seed) for seed in seeds]))
    epochs = run.settings["pretrain"]
    if not epochs:
        return fresh
    named = lambda seed: run.out and run.out.with_name(f"{run.name}-{epochs}-{seed}.npz")
    tree = jax.tree.structure(fresh)
    if run.out and all(named(seed).exists() for seed in seeds):
        kept = [list(np.load(named(seed)).values()) for seed in seeds]
        return jax.tree.unflatten(tree, [jnp.stack(x) for x in zip(*kept, strict=True)])
    steps = run.steps(epochs)
    task = run.progress.add_task(f"{run.name}, dense weights", total=steps)
    advance = lambda count: run.progress.advance(task, count)
    params, _ = train(apply, fresh, run.data[0], seeds, steps, advance)
    for i, seed in enumerate(seeds):
        if run.out:
            np.savez(named(seed), *[x[i] for x in jax.tree.leaves(params)])
    return params


def trained(run, method, sparsity, seeds):
    """Compression, parameters and the optimizer's states of all seeds."""
    base, (init, apply), s = method.partition("+")[0], MODELS[run.name], run.settings
    fresh = jax.vmap(init)(jnp.stack([jax.random.key(seed) for seed in seeds]))
    dense = dense_start(run, seeds)
    steps = run.steps(s["epochs"])
    total = steps * (mnist_training.ROUNDS + 1 if method == "tickets" else 1)
    task = run.progress.add_task(f"{run.name}, {method} {sparsity:.0%}", total=total)
    advance = lambda count: run.progress.advance(task, count)
    uses = jc.uses(apply, jax.tree.map(lambda x: x[0], fresh), run.data[0][0][:1])
    if method == "tickets":
        return tickets(apply, fresh, run.data[0], seeds, steps, sparsity, uses, advance)
    c = compression(method, sparsity, steps)
    if c is None and s["pretrain"]:
        return None, dense, dense
    price = s["penalty"] * PENALTIES.get(base, 0.0)
    begin = dense if base in FROM_DENSE or (c is not None and base == "dense") else fresh
    teaching = 0.0 if base == "dense" and c is None else s["distil"]
    rate = GATES_RATE if base == "l0" else None  # Gates have further to go than weights.
    options = {"penalty": price, "teacher": dense, "teaching": teaching, "gates_rate": rate}
    return c, *train(apply, begin, run.data[0], seeds, steps, advance, c, uses, **options)


def figures(run, method, sparsity, seeds):
    """Trains all seeds by one method; yields a row of figures for each."""
    begin, apply = time.perf_counter(), MODELS[run.name][1]
    c, params, opt_state = trained(run, method, sparsity, seeds)
    seconds = time.perf_counter() - begin
    for i, seed in enumerate(seeds):
        own, own_state = jax.tree.map(lambda x, i=i: x[i], (params, opt_state))
        small = own if c is None else jc.compress(own, c, state=own_state)
        if method.endswith("+int8"):
            # What training has pruned is 0, and stays so.
            zeros = jc.prune(jc.scores.magnitude(), threshold=1e-30, where=WEIGHTS)
            int8 = jc.quantize("int8", where=WEIGHTS)
            uses = jc.uses(apply, own, run.data[0][0][:1])
            after = int8 if c is None else jc.chain(zeros, int8)
            small = jc.compress(jc.materialize(small), after, uses=uses)
        found = jc.evaluate(apply, small, batches(*run.data[1]), list(FIGURES))
        row = {"model": run.name, "method": method, "sparsity": sparsity, "seed": seed}
        row |= {**run.settings, **{k: found[k] for k in FIGURES}, "bytes": jc.nbytes(small)}
        kernels = [x for x in jax.tree.leaves(jc.materialize(small)) if x.ndim > 1]
        zeros = sum(int(jnp.sum(x == 0)) for x in kernels) / sum(x.size for x in kernels)
        yield row | {"zeros": zeros, "seconds": round(seconds / len(seeds), 1)}


def groups(rows):
    """Rows that differ in their seeds only, sorted; with what tells them apart."""
    key = lambda row: tuple(row[k] for k in ("model", "sparsity", "method", *SETTINGS))
    for group in sorted(dict.fromkeys(map(key, rows))):
        yield [row for row in rows if key(row) == group]


def show(rows):
    """The table for people: means over seeds."""
    table = Table(title="MNIST, 10000 test images", box=box.SIMPLE_HEAD, padding=0)
    titles = "model|method|epochs|asked|zeros %|error %|std|seeds|precision|recall|F1|bytes|s"
    for title in titles.split("|"):
        table.add_column(title, justify="left" if title in ("model", "method") else "right")
    for mine in groups(rows):
        first, mean = mine[0], lambda k, mine=mine: np.mean([row[k] for row in mine])
        std = np.std([row["accuracy"] for row in mine], ddof=1) if len(mine) > 1 else np.nan
        table.add_row(
            first["model"],
            first["method"] + (", distilled" if first["distil"] else ""),
            f"{first['pretrain']}+{first['epochs']}" if first["pretrain"] else str(first["epochs"]),
            f"{first['sparsity']:.0%}" if first["sparsity"] else "",
            f"{100 * mean('zeros'):.2f}",
            f"{100 - 100 * mean('accuracy'):.2f}",
            f"{100 * std:.2f}" if len(mine) > 1 else "",
            str(len(mine)),
            *(f"{100 * mean(k):.2f}" for k in FIGURES[1:]),
            f"{mean('bytes'):,.0f}",
            f"{mean('seconds'):.0f}",
        )
    Console(width=120).print(table)


def plot(path, rows):
    """Errors over the share of weights that stay, a panel for each model."""
    matplotlib = require("matplotlib", extra="examples")
    figure = require("matplotlib.figure", extra="examples").Figure((9, 4), layout="constrained")
    models = list(dict.fromkeys(row["model"] for row in rows))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        for axes, model in zip(
            figure.subplots(1, len(models), squeeze=False)[0], models, strict=True
        ):
            points = {}
            for mine in groups([row for row in rows if row["model"] == model]):
                label = mine[0]["method"] + (", distilled" if mine[0]["distil"] else "")
                error = 100 - 100 * np.mean([row["accuracy"] for row in mine])
                left = 100 - 100 * np.mean([row["zeros"] for row in mine])
                points.setdefault(label, []).append((left, error))
            for label, found in points.items():
                axes.plot(*zip(*sorted(found), strict=True), marker="o", markersize=4, label=label)
            axes.set(xscale="log", xlabel="weights that stay (%)", ylabel="error (%)", title=model)
            axes.legend(frameon=False, fontsize="small")
        figure.savefig(path)


def main():
    """Runs what is wanted and not there yet, and prints a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="LeNet-300-100", choices=list(MODELS))
    roundings = [m + r for m in METHODS[:-1] for r in ("", "+int8", "+qat")]
    parser.add_argument("--methods", nargs="+", default=GRID, choices=[*roundings, "tickets"])
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.9, 0.95, 0.98, 0.99])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--pretrain", type=int, default=0, help="epochs of dense weights")
    parser.add_argument("--distil", type=float, default=0.0, help="the weight of their logits")
    parser.add_argument("--penalty", type=float, default=1.0, help="times that of the papers")
    parser.add_argument("--quick", action="store_true", help="one seed, few images and methods")
    parser.add_argument("--out", type=Path, help="write results to this JSON, run by run")
    parser.add_argument("--resume", action="store_true", help="skip what --out holds already")
    parser.add_argument("--plot", type=Path, help="draw all of --out, to an SVG or a PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    args = parser.parse_args()
    data = [[jnp.asarray(x), jnp.asarray(y, jnp.int32)] for x, y in mnist()]
    if args.quick:
        args.methods, args.sparsities, args.seeds = ["dense", "global", "rigl"], [0.9], [0]
        args.epochs = 2
        data = [[x[:n] for x in part] for part, n in zip(data, (6400, 1000), strict=True)]

    rows = json.loads(args.out.read_text()) if args.resume and args.out.exists() else []
    settings = {k: getattr(args, k) for k in SETTINGS[:-1]} | {"images": len(data[0][1])}
    free = ("dense", "dense+int8", "dense+qat", *PENALTIES)
    pairs = [(m, s) for m in args.methods for s in ([0.0] if m in free else args.sparsities)]
    with Progress(disable=args.json) as progress:
        run = Run(args.model, data, settings, progress, args.out)
        for method, sparsity in pairs:
            same = {"model": args.model, "method": method, "sparsity": sparsity, **settings}
            done = [row["seed"] for row in rows if same.items() <= row.items()]
            seeds = [seed for seed in args.seeds if seed not in done]
            for own in [[s] for s in seeds] if args.model in APART else [seeds] * bool(seeds):
                rows += figures(run, method, sparsity, own)
                if args.out:
                    args.out.write_text(json.dumps(rows, indent=1))
    if args.plot:
        plot(args.plot, rows)
    if args.json:
        return print(json.dumps(rows))
    show(rows)


if __name__ == "__main__":
    main()
