"""LeNet-300-100 and LeNet-5 on MNIST as small files: pruned, shared and coded; or trained for bits.

    deep    gradual magnitude pruning, then k-means whose centroids are trained, then an entropy
            coder: prune + share + code
    rate    cross-entropy plus the bits that a coder would need, with steps that are trained

Each run trains from scratch with Adam and one cosine cycle, on images that are shifted by up to one
pixel at random. The tree is saved, coded; a new process loads the file and evaluates it on the
10000 test images. `bytes` are those of the coded arrays, biases included, `folder` those of all
files of the checkpoint, with the document that says what the tree is made of, and checksums. All:

    python -m examples.deep_compression --method deep --strengths 0.94 0.97 0.98 \\
        --seeds 0 1 2 --epochs 30 --out deep.json --resume
    python -m examples.deep_compression --method rate --strengths 1e-6 2e-6 4e-6 \\
        --seeds 0 1 2 --epochs 60 --out rate.json --resume
    python -m examples.deep_compression --quick                     # a minute, to see it run

References:
    Han et al., 2016, Deep Compression: Compressing Deep Neural Networks with Pruning, Trained
    Quantization and Huffman Coding. Wiedemann et al., 2020, DeepCABAC.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxopt_compress as jc
from examples.data import mnist
from examples.mnist_pruning import shifted
from examples.models.lenet import MODELS, WEIGHTS
from examples.models.training import batches, cross_entropy

BATCH, EVERY = 128, 50


def deep(sparsity, clusters, steps):
    """Pruned until 60% of the steps, then few values, whose centroids are trained to the end."""
    rising = jc.schedules.polynomial(sparsity, begin=steps // 20, end=steps * 6 // 10, every=EVERY)
    c = jc.chain(
        jc.prune(jc.scores.magnitude(), rising, where=WEIGHTS, scope="global"),
        jc.share(clusters, where=WEIGHTS, centroid_dtype="float16", begin=steps * 7 // 10),
        jc.quantize("int8", where="**/bias"),
    )
    return c, 0.0


def rate(cost, clusters, steps):
    """Bits at a price that rises to ``cost`` until half of the steps."""
    del clusters
    price = lambda count: cost * jnp.minimum(1.0, count / (0.5 * steps)) ** 2
    return jc.rate_distortion(where="**", step=2.0**-5), price


METHODS = {"deep": deep, "rate": rate}


def train(apply, params, data, seed, steps, c, price, uses):
    """Trains by Adam; returns parameters and the optimizer's state."""
    schedule = optax.cosine_decay_schedule(2e-3, steps)
    learned = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    tx = jc.compressed_training(optax.adam(schedule), c, learned, uses, penalty=price)
    loss = cross_entropy(apply)

    @jax.jit
    def step(params, opt_state, rows, key):
        images = shifted(key, data[0][rows])
        at_view = lambda view: loss(view, None, images, data[1][rows])[0]
        grads = jax.grad(at_view)(c.view(params, opt_state))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    per_epoch = len(data[1]) // BATCH
    now, rng, key = (params, tx.init(params)), np.random.default_rng(seed), jax.random.key(seed)
    for i in track(range(steps), "training", transient=True, disable=not sys.stdout.isatty()):
        if i % per_epoch == 0:
            order = jnp.asarray(rng.permutation(len(data[1])))
        rows = order[i % per_epoch * BATCH :][:BATCH]
        now = step(*now, rows, jax.random.fold_in(key, i))
        if i % 20 == 0:
            jax.block_until_ready(now)  # Steps are dispatched ahead: progress would be a lie.
    return now


def run(name, method, strength, seed, args, data, folder):
    """Trains, saves, and evaluates the file in a new process: a row of figures."""
    (init, apply), (training, test) = MODELS[name], data
    params, start = init(jax.random.key(seed)), time.perf_counter()
    uses = jc.uses(apply, params, training[0][:1])
    steps = args.epochs * (len(training[1]) // BATCH)
    c, price = METHODS[method](strength, args.clusters, steps)
    params, opt_state = train(apply, params, training, seed, steps, c, price, uses)
    small = jc.compress(params, c, state=opt_state)
    path = folder / f"{name}-{method}-{strength:g}-{seed}"
    jc.save(path, small, overwrite=True, coding=args.coding)
    told = [sys.executable, "-m", "examples.deep_compression", "--model", name]
    # The test images may be fewer, of a quick run.
    told += ["--evaluate", str(path), "--images", str(len(test[1]))]
    found = json.loads(subprocess.run(told, capture_output=True, text=True, check=True).stdout)
    kept = sum(int(jnp.sum(x != 0)) for x in jax.tree.leaves(jc.materialize(small)))
    files = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {
        "model": name,
        "method": method,
        "strength": strength,
        "seed": seed,
        "epochs": args.epochs,
        "clusters": args.clusters,
        "error": 100 - 100 * found["accuracy"],
        "kept": kept,
        "plain": jc.nbytes(small),
        "bytes": jc.coded_bytes(small, args.coding),
        "folder": files,
        "ratio": jc.nbytes(params) / jc.coded_bytes(small, args.coding),
        "seconds": time.perf_counter() - start,
    }


def evaluated(name, path, images):
    """Accuracy of a file, run as it is stored."""
    small, apply = jc.load(path), MODELS[name][1]
    pixels, labels = mnist()[1]
    test = batches(pixels[:images], labels[:images])
    return jc.evaluate(apply, small, test, {"accuracy": jc.metrics.accuracy()})


def show(rows):
    """A table of the runs."""
    columns = ("model", "method", "strength", "seed", "error", "kept", "bytes", "folder", "ratio")
    table = Table(*columns, box=box.SIMPLE, title="MNIST, 10000 test images")
    for row in rows:
        text = {**row, "error": f"{row['error']:.2f}", "ratio": f"{row['ratio']:.1f}"}
        table.add_row(*(str(text[k]) for k in columns))
    Console(width=120).print(table)


def main():
    """Runs what is wanted and not there yet, and prints a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--method", default="deep", choices=list(METHODS))
    about = "of deep: the sparsity; of rate: what a bit costs in nats, at most"
    parser.add_argument("--strengths", type=float, nargs="+", help=about)
    parser.add_argument("--clusters", type=int, default=16)
    parser.add_argument("--coding", default="context", help="as of jaxopt_compress.save")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="few images and epochs")
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here")
    parser.add_argument("--out", type=Path, help="write results to this JSON, run by run")
    parser.add_argument("--resume", action="store_true", help="skip what --out holds already")
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    parser.add_argument("--evaluate", type=Path, help="print the accuracy of this file as JSON")
    parser.add_argument("--images", type=int, default=10000, help="test images of --evaluate")
    args = parser.parse_args()
    if args.evaluate:
        return print(json.dumps(evaluated(args.model[0], args.evaluate, args.images)))
    data = [[jnp.asarray(x), jnp.asarray(y, jnp.int32)] for x, y in mnist()]
    if args.quick:
        args.model, args.epochs = ["LeNet-300-100"], 2
        data = [[x[:n] for x in part] for part, n in zip(data, (6400, 1000), strict=True)]
    strengths = args.strengths or {"deep": [0.97], "rate": [2e-6]}[args.method]
    rows = []
    if args.resume and args.out and args.out.exists():
        rows = json.loads(args.out.read_text())
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for name, strength, seed in (
            (n, s, r) for n in args.model for s in strengths for r in args.seeds
        ):
            same = {"model": name, "method": args.method, "strength": strength, "seed": seed}
            same |= {"epochs": args.epochs, "clusters": args.clusters}
            if not any(same.items() <= row.items() for row in rows):
                rows.append(run(name, args.method, strength, seed, args, data, folder))
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1))
    return print(json.dumps(rows)) if args.json else show(rows)


if __name__ == "__main__":
    main()
