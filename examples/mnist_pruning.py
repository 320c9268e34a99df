"""LeNet-300-100 and LeNet-5 on MNIST, pruned while they are trained.

Each run trains from scratch for the same number of epochs with Adam and one cosine cycle, on images
that are shifted by up to one pixel at random. Seeds are trained at once, by `jax.vmap` over
parameters and optimizer states. Figures are those of the stored form (kept float32 weights and
where they go; biases whole) on the 10000 test images.

    dense      nothing is pruned
    gradual    by magnitude, along a cubic schedule; layers share the sparsity by Erdős-Rényi-kernel
    global     the same, one threshold for all layers
    rigl       sparse from the start: the smallest weights go, those with the largest gradients come
    set        sparse from the start: the smallest weights go, others come by chance
    l0         each weight has a random gate, and open gates cost; how many, training finds
    variational  each weight has noise of a learned size, and goes where it is all noise; likewise
    tickets    five rounds of training; masks by magnitude, the rest rewound to early weights

    python -m examples.mnist_pruning --out results.json --resume
    python -m examples.mnist_pruning --model LeNet-5 --methods global --sparsities 0.99 --seeds 0
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
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import jaxopt_compress as jc
from examples.data import mnist
from examples.models.lenet import MODELS, WEIGHTS
from examples.models.training import batches, cross_entropy

METHODS = ("dense", "gradual", "global", "rigl", "set", "l0", "variational", "tickets")
PENALTIES = {"l0": 0.1, "variational": 1.0}  # over the number of images, as in the papers
FIGURES = ("accuracy", "precision_macro", "recall_macro", "f1_macro")
BATCH, RATE, EVERY, ROUNDS = 128, 3e-3, 50, 5


def compression(method, sparsity, steps):
    """How a method prunes within so many steps; None for no pruning."""
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


def shifted(key, images):
    """Each image moved by up to one pixel either way."""
    corners = jax.random.randint(key, (len(images), 2), 0, 3)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1)))
    cut = lambda image, at: lax.dynamic_slice(image, tuple(at), images.shape[1:])
    return jax.vmap(cut)(padded, corners)


def make_step(apply, tx, view):
    """``step(state, data, rows, key) -> state`` of one member: parameters and optimizer state."""
    loss = lambda params, images, labels: cross_entropy(apply)(params, None, images, labels)[0]

    def step(state, data, rows, key):
        params, opt_state = state
        images = shifted(key, data[0][rows])
        grads = jax.grad(loss)(view(params, opt_state), images, data[1][rows])
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def train(apply, params, data, seeds, steps, c, uses, advance, state=None, penalty=0.0):
    """Trains all members from ``params``; returns parameters and the optimizer's states.

    `state` is that of the compression, where masks are there already; ``advance`` is told of steps.
    """
    tx = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    view = lambda params, opt_state: params
    if c is not None:
        # The price of an entry grows, or all would go before any has learned.
        rising = optax.linear_schedule(0.0, penalty / len(data[1]), steps // 2) if penalty else 0.0
        tx, view = jc.compressed_training(tx, c, uses=uses, penalty=rising), c.view
    many = jax.vmap if len(seeds) > 1 else alone
    step = jax.jit(many(make_step(apply, tx, view), in_axes=(0, None, 0, 0)), donate_argnums=0)
    now = (jax.tree.map(jnp.copy, params), jax.jit(many(tx.init))(params))
    if state is not None:
        now = (now[0], optax.tree_utils.tree_set(now[1], compression=state))
    images, orders = len(data[1]), jnp.zeros((len(seeds), 0), jnp.int32)
    own = jnp.stack([jax.random.key(seed) for seed in seeds])
    permuted = jax.jit(jax.vmap(lambda key: jax.random.permutation(key, images)))
    folded = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(0, None)))
    for i in range(steps):
        at, keys = i % (images // BATCH), folded(own, i)
        orders = permuted(keys) if at == 0 else orders
        now = step(now, data, lax.dynamic_slice_in_dim(orders, at * BATCH, BATCH, axis=1), keys)
        if i % 20 == 0:
            jax.block_until_ready(now)  # Steps are dispatched ahead: progress would be a lie.
            advance(20)
    return now


def alone(fn, in_axes: Any = 0):
    """As `jax.vmap` for one member: convolutions by kernels of many members are slow on CPUs."""

    def run(*args):
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        first = lambda x: x[0]
        own = [jax.tree.map(first, x) if a == 0 else x for a, x in zip(axes, args, strict=True)]
        return jax.tree.map(lambda x: x[None], fn(*own))

    return run


def tickets(apply, params, data, seeds, steps, sparsity, uses, advance):
    """Iterative magnitude pruning: the weights that training has made large, from early values."""
    early, _ = train(
        apply, params, data, seeds, max(1, steps // 20), None, uses, lambda count: None
    )
    trained, _ = train(apply, early, data, seeds, steps, None, uses, advance)
    for i in range(1, ROUNDS + 1):
        kept = 1 - (1 - sparsity) ** (i / ROUNDS)
        schedule = jc.schedules.constant(kept)
        c = jc.prune(jc.scores.magnitude(), schedule, where=WEIGHTS, scope="global")
        many = jax.vmap if len(seeds) > 1 else alone
        # What training has not kept is 0 in the parameters that it hands on.
        state = jax.jit(many(lambda p, c=c: c.init(p, uses=uses)))(trained)
        trained, opt_state = train(apply, early, data, seeds, steps, c, uses, advance, state)
        trained = jax.jit(many(c.view))(trained, opt_state)
    return c, trained, opt_state


def run(name, method, sparsity, seeds, epochs, data, progress, factor=1.0):
    """Trains all seeds by one method; yields a row of figures for each."""
    (init, apply), (training, test) = MODELS[name], data
    params = jax.vmap(init)(jnp.stack([jax.random.key(seed) for seed in seeds]))
    one = jax.tree.map(lambda x: x[0], params)
    uses = jc.uses(apply, one, training[0][:1])
    steps = epochs * (len(training[1]) // BATCH)
    total = steps * (ROUNDS + 1 if method == "tickets" else 1)
    task = progress.add_task(f"{name}, {method} {sparsity:.0%}", total=total)
    advance, begin = lambda count: progress.advance(task, count), time.perf_counter()
    if method == "tickets":
        c, params, opt_state = tickets(
            apply, params, training, seeds, steps, sparsity, uses, advance
        )
    else:
        c = compression(method, sparsity, steps)
        price = factor * PENALTIES.get(method, 0.0)
        params, opt_state = train(
            apply, params, training, seeds, steps, c, uses, advance, penalty=price
        )
    seconds = time.perf_counter() - begin
    for i, seed in enumerate(seeds):
        own, own_state = jax.tree.map(lambda x, i=i: x[i], (params, opt_state))
        small = own if c is None else jc.compress(own, c, state=own_state)
        found = jc.evaluate(apply, small, batches(*test), list(FIGURES))
        row = {"model": name, "method": method, "sparsity": sparsity, "seed": seed}
        row |= {key: found[key] for key in FIGURES} | {"bytes": jc.nbytes(small)}
        dense = jc.materialize(small)
        kernels = [x for x in jax.tree.leaves(dense) if x.ndim > 1]
        zeros = sum(int(jnp.sum(x == 0)) for x in kernels) / sum(x.size for x in kernels)
        yield row | {"zeros": zeros} | {"seconds": round(seconds / len(seeds), 1)}


def show(rows):
    """The table for people: means over seeds."""
    table = Table(title="MNIST, 10000 test images", box=box.SIMPLE_HEAD, padding=0)
    titles = "model|method|asked|zeros %|error %|std|precision|recall|F1|bytes|ratio|seconds"
    for title in titles.split("|"):
        table.add_column(title, justify="left" if title in ("model", "method") else "right")
    key = lambda row: (row["model"], row["method"], row["sparsity"])
    full = {row["model"]: row["bytes"] for row in rows if row["method"] == "dense"}
    for group in sorted(dict.fromkeys(map(key, rows)), key=lambda k: (k[0], k[2])):
        mine = [row for row in rows if key(row) == group]
        mean = {k: np.mean([row[k] for row in mine]) for k in (*FIGURES, "bytes", "seconds")}
        std = np.std([row["accuracy"] for row in mine], ddof=1) if len(mine) > 1 else np.nan
        ratio = full.get(group[0], np.nan) / mean["bytes"]
        table.add_row(
            group[0],
            group[1],
            f"{group[2]:.0%}" if group[2] else "",
            f"{100 * np.mean([row['zeros'] for row in mine]):.2f}",
            f"{100 - 100 * mean['accuracy']:.2f}",
            f"{100 * std:.2f}",
            *(f"{100 * mean[k]:.2f}" for k in FIGURES[1:]),
            f"{mean['bytes']:,.0f}",
            f"{ratio:.1f}",
            f"{mean['seconds']:.0f}",
        )
    Console(width=120).print(table)


def main():
    """Runs what is wanted and not there yet, and prints a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="LeNet-300-100", choices=list(MODELS))
    wanted = list(METHODS[:-1])
    parser.add_argument("--methods", nargs="+", default=wanted, choices=METHODS)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98, 0.99])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--penalty", type=float, default=1.0, help="times that of the papers")
    parser.add_argument("--quick", action="store_true", help="one seed, few images and methods")
    parser.add_argument("--out", type=Path, help="write results to this JSON, run by run")
    parser.add_argument("--resume", action="store_true", help="skip what --out holds already")
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    args = parser.parse_args()
    data = [[jnp.asarray(x), jnp.asarray(y, jnp.int32)] for x, y in mnist()]
    if args.quick:
        args.methods, args.sparsities, args.seeds = ["dense", "global", "rigl"], [0.9], [0]
        args.epochs = 2
        data = [[x[:n] for x in part] for part, n in zip(data, (6400, 1000), strict=True)]

    rows, results = [], {"epochs": args.epochs, "images": len(data[0][1]), "penalty": args.penalty}
    if args.resume and args.out and args.out.exists():
        kept = json.loads(args.out.read_text())
        rows = kept.pop("rows")
        if kept != results:
            sys.exit(f"{args.out} holds runs of other epochs or penalties")
    results["rows"] = rows
    asked = lambda method: [0.0] if method in ("dense", *PENALTIES) else args.sparsities
    pairs = [(method, sparsity) for method in args.methods for sparsity in asked(method)]
    with Progress(disable=args.json) as progress:
        for method, sparsity in pairs:
            same = {"model": args.model, "method": method, "sparsity": sparsity}
            done = [row["seed"] for row in rows if same.items() <= row.items()]
            seeds = [seed for seed in args.seeds if seed not in done]
            own = args.model, method, sparsity, seeds, args.epochs
            found = run(*own, data, progress, args.penalty)
            rows += list(found) if seeds else []
            if args.out:
                args.out.write_text(json.dumps(results, indent=1))
    if args.json:
        return print(json.dumps(results))
    show(rows)


if __name__ == "__main__":
    main()
