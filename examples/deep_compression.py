"""LeNet-300-100 and LeNet-5 on MNIST as small files: pruned, shared and coded; or trained for bits.

    deep    gradual magnitude pruning, then k-means whose centroids are trained, then an entropy
            coder: prune + share + code
    rate    cross-entropy plus the bits that a coder would need, with steps that are trained

Both start from a dense network, trained once and kept in ``--folder``. ``--flops 0.2`` then removes
hidden units and channels of least magnitude until this share of the operations is left, ``--units
9 20 80`` until so many are left of each layer, and training goes on with what stays. ``--teacher
0.7`` makes the dense LeNet-5 a teacher: that share of the loss is distance to its logits, at the
same shift of the same image. Training is by Adam on images that are shifted by up to one pixel at
random; the last 5000 of the 60000 are held out, and choices are made by the error on them
(``validation``).

The tree is saved, coded; a new process loads the file and evaluates it on the 10000 test images.
`bytes` are those of the coded arrays, biases included, `folder` those of all files of the
checkpoint, with the document that says what the tree is made of, and checksums.

    python -m examples.deep_compression --strengths 0.94 0.97 --seeds 0 1 2 --out deep.json
    python -m examples.deep_compression --method rate --model LeNet-300-100 --strengths 1e-5 3e-5 \\
        --teacher 0.7 --epochs 60 --out rate.json
    python -m examples.deep_compression --plot curve.png --out rate.json
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
from jax import lax
from rich.progress import track

import jaxopt_compress as jc
from examples.data import mnist
from examples.models.lenet import FASTER, MODELS, WEIGHTS
from examples.models.training import batches
from examples.results import Results, show
from jaxopt_compress.extras import require

BATCH, EVERY, HELD_OUT, TEMPERATURE = 128, 50, 5000, 2.0


def deep(sparsity, args, steps):
    """Pruned until 60% of the steps, then few values, whose centroids are trained to the end."""
    rising = jc.schedules.polynomial(sparsity, begin=steps // 20, end=steps * 6 // 10, every=EVERY)
    c = jc.chain(
        jc.prune(jc.scores.magnitude(), rising, where=WEIGHTS, scope="global"),
        jc.share(args.clusters, where=WEIGHTS, centroid_dtype="float16", begin=steps * 7 // 10),
        jc.quantize("int8", where="**/bias"),
    )
    return c, 0.0


def rate(cost, args, steps):
    """Bits at a price that rises to ``cost`` until half of the steps."""
    price = lambda count: cost * jnp.minimum(1.0, count / (0.5 * steps)) ** 2
    return jc.rate_distortion(where=(WEIGHTS, "**/bias"), step=args.step), price


METHODS = {"deep": deep, "rate": rate}


def shifted(images, places):
    """Each image moved by up to one pixel either way; places 0 to 8, of which 4 is where it was."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1)))
    cut = lambda image, at: lax.dynamic_slice(image, (at // 3, at % 3), images.shape[1:])
    return jax.vmap(cut)(padded, places)


def loss_of(apply, share):
    """``loss(view, images, labels, logits)``: labels, and for a share the logits of a teacher."""

    def loss(view, images, labels, logits):
        found = apply(view, images)
        hard = optax.softmax_cross_entropy_with_integer_labels(found, labels)
        if logits is None:
            return hard.mean()
        soft = jc.distillation.soft_targets(found, logits, TEMPERATURE)
        return jnp.mean((1 - share) * hard + share * soft)

    return loss


def train(loss, params, data, seed, steps, tx, view=lambda params, state: params):
    """Trains by an optimizer; returns parameters and its state."""
    per_epoch = len(data[1]) // BATCH

    @jax.jit
    def step(params, opt_state, data, rows, key):
        images, labels, logits = data
        places = jax.random.randint(key, rows.shape, 0, 9)
        own = None if logits is None else logits[places, rows]
        at_view = lambda view: loss(view, shifted(images[rows], places), labels[rows], own)
        grads = jax.grad(at_view)(view(params, opt_state))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    now, rng, key = (params, tx.init(params)), np.random.default_rng(seed), jax.random.key(seed)
    for i in track(range(steps), "training", transient=True, disable=not sys.stdout.isatty()):
        if i % per_epoch == 0:
            order = jnp.asarray(rng.permutation(len(data[1])))
        rows = order[i % per_epoch * BATCH :][:BATCH]
        now = step(*now, data, rows, jax.random.fold_in(key, i))
        if i % 20 == 0:
            jax.block_until_ready(now)  # Steps are dispatched ahead: progress would be a lie.
    return now


def dense(name, epochs, data, folder):
    """The dense network, trained once."""
    path, (init, apply) = folder / f"dense-{name}-{epochs}", MODELS[name]
    if not path.exists():
        steps = epochs * (len(data[1]) // BATCH)
        tx = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2)
        params = init(jax.random.key(0))
        jc.save(path, train(loss_of(apply, 0), params, (*data, None), 0, steps, tx)[0])
    return jc.load(path)


def teacher(epochs, data, folder):
    """Logits of the dense LeNet-5, float32 (9, images, 10), at each shift."""
    path, name = folder / f"logits-{epochs}.npy", "LeNet-5"
    if not path.exists():
        params, apply = dense(name, epochs, data, folder), jax.jit(MODELS[name][1])
        found = lambda place, x: apply(params, shifted(x, jnp.full(len(x), place)))
        parts = [data[0][i : i + 500] for i in range(0, len(data[0]), 500)]
        np.save(path, [np.concatenate([found(p, x) for x in parts]) for p in range(9)])
    return jnp.asarray(np.load(path), jnp.float32)


def smaller(apply, params, images, args):
    """The parameters without the units of least magnitude; the function fits them as it is."""
    if args.flops == 1 and not args.units:
        return params
    groups = jc.find_groups(apply, params, images[:1])
    if not args.units:
        return groups.plan(budget=jc.flops(args.flops)).rewrite().params
    # In the order of layers, as --units are.
    pairs = zip(groups.scores().items(), args.units, strict=True)
    gone = {name: np.argsort(scores)[: len(scores) - left] for (name, scores), left in pairs}
    return groups.plan(units=gone).rewrite().params


def optimizers(steps, speed):
    """Adam for parameters and learned parts: as it is for 45% of the steps, then one cosine."""
    hold = steps * 45 // 100
    parts = [optax.constant_schedule(speed), optax.cosine_decay_schedule(speed, steps - hold)]
    return optax.adam(optax.join_schedules(parts, [hold]))


def run(name, method, strength, seed, args, data, folder):
    """Trains, saves, and evaluates the file in a new process: a row of figures."""
    (_, apply), (training, test) = MODELS[name], data
    # What is held out comes last, and no network has seen it.
    training = [x[: len(x) - args.held_out] for x in training]
    whole = dense(name, args.dense, training, folder)
    logits = teacher(args.dense, training, folder) if args.teacher else None
    start = time.process_time()
    params = smaller(apply, whole, training[0], args)
    uses = jc.uses(apply, params, training[0][:1])
    steps = args.epochs * (len(training[1]) // BATCH)
    c, price = METHODS[method](strength, args, steps)
    tx = optimizers(steps, args.rate)
    tx = jc.compressed_training(tx, c, uses=uses, penalty=price)
    loss = loss_of(FASTER.get(apply, apply), args.teacher)
    params, opt_state = train(loss, params, (*training, logits), seed, steps, tx, c.view)
    small = jc.compress(params, c, state=opt_state)
    path = folder / f"{name}-{method}-{strength:g}-{seed}"
    jc.save(path, small, overwrite=True, coding=args.coding)
    told = [sys.executable, "-m", "examples.deep_compression", "--model", name]
    told += ["--evaluate", str(path), "--held-out", str(args.held_out)]
    told += ["--images", str(len(test[1]))]  # They may be fewer, of a quick run.
    found = json.loads(subprocess.run(told, capture_output=True, text=True, check=True).stdout)
    kept = sum(int(jnp.sum(x != 0)) for x in jax.tree.leaves(jc.materialize(small)))
    files = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {
        "model": name,
        "method": method,
        **{key: 100 - 100 * value for key, value in found.items()},
        "kept": kept,
        "plain": jc.nbytes(small),
        "bytes": jc.coded_bytes(small, args.coding),
        "folder": files,
        "ratio": jc.nbytes(whole) / jc.coded_bytes(small, args.coding),
        "seconds": time.process_time() - start,
    }


def named(name, method, strength, seed, args):
    """A name that tells a run from others: it says all that may differ."""
    keys = ["clusters" if method == "deep" else "step", "epochs", "dense", "rate"]
    keys += ["flops", "units", "teacher"]
    values = {"seed": seed} | {key: getattr(args, key) for key in keys}
    own = [f"{k}={v}" for k, v in values.items() if v is not None]
    return " ".join([name, method, f"{strength:g}", *own])


def evaluated(name, path, images, held_out):
    """Accuracy of a file, run as it is stored, on held-out and on test images."""
    small, apply = jc.load(path), MODELS[name][1]
    (seen, labels), test = mnist()
    parts = {"validation": (seen[-held_out:], labels[-held_out:])}
    parts["error"] = [x[:images] for x in test]
    metrics = {"accuracy": jc.metrics.accuracy()}
    found = {k: jc.evaluate(apply, small, batches(*part), metrics) for k, part in parts.items()}
    return {key: figures["accuracy"] for key, figures in found.items()}


def plot(rows, path):
    """Test error against the ratio, a panel per network."""
    matplotlib = require("matplotlib.figure", extra="examples")
    figure = matplotlib.Figure(figsize=(9, 4), layout="constrained")
    names = sorted({row["model"] for row in rows})
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for name, panel in zip(names, panels, strict=True):
        for method, marker in (("deep", "o"), ("rate", "^")):
            own = [row for row in rows if (row["model"], row["method"]) == (name, method)]
            points = [[row[key] for row in own] for key in ("ratio", "error")]
            panel.plot(*points, marker, label=method)
        panel.set(title=name, xlabel="times smaller", ylabel="test error, %", xlim=(0, None))
        panel.legend(frameon=False)
    figure.savefig(path)


def parsed():
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--method", default="deep", choices=list(METHODS))
    left = parser.add_mutually_exclusive_group()
    left.add_argument("--flops", type=float, default=1.0, help="share that removal leaves")
    about = "how many units removal leaves of each hidden layer, such as 9 20 80"
    left.add_argument("--units", type=int, nargs="+", help=about)
    about = "of deep: the sparsity; of rate: what a bit costs in nats, at most"
    parser.add_argument("--strengths", type=float, nargs="+", help=about)
    parser.add_argument("--clusters", type=int, default=16)
    parser.add_argument("--step", type=float, default=0.125, help="of rate: where steps start")
    parser.add_argument("--rate", type=float, default=2e-3, help="the learning rate")
    parser.add_argument("--teacher", type=float, default=0.0, help="share of it in the loss")
    parser.add_argument("--coding", default="context", help="as of jaxopt_compress.save")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--dense", type=int, default=6, help="epochs of the dense network")
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--quick", action="store_true", help="few images and epochs")
    parser.add_argument("--folder", type=Path, help="keep networks and checkpoints here")
    parser.add_argument("--out", help="a JSON of figures; runs that it holds are not run again")
    parser.add_argument("--plot", type=Path, help="draw all that --out holds")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--evaluate", type=Path, help="print the accuracy of this file as JSON")
    parser.add_argument("--images", type=int, default=10000, help="test images of --evaluate")
    args = parser.parse_args()
    if args.quick:
        args.model, args.epochs, args.dense, args.held_out = ["LeNet-300-100"], 2, 1, 400
    return args


def main():
    """Runs what is wanted and not there yet, and prints a table."""
    args = parsed()
    if args.evaluate:
        found = evaluated(args.model[0], args.evaluate, args.images, args.held_out)
        return print(json.dumps(found))
    data = [[jnp.asarray(x), jnp.asarray(y, jnp.int32)] for x, y in mnist()]
    if args.quick:
        data = [[x[-n:] for x in part] for part, n in zip(data, (6800, 1000), strict=True)]
    # A plot alone runs nothing.
    default = [] if args.plot else [{"deep": 0.97, "rate": 1e-5}[args.method]]
    strengths = args.strengths or default
    results = Results(args.out, {"held out": args.held_out, "images": len(data[1][1])})
    asked = [(n, args.method, s, r) for n in args.model for s in strengths for r in args.seeds]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        for one in asked:
            results.row(named(*one, args), lambda one=one: run(*one, args, data, folder))
    if args.plot:
        plot(results.rows.values(), args.plot)
    if args.json:
        return print(json.dumps(results.rows))
    columns = ["validation", "error", "kept", "bytes", "folder", "ratio"]
    figures = lambda row: [f"{row[key]:,.2f}".removesuffix(".00") for key in columns]
    show("MNIST", columns, {name: figures(row) for name, row in results.rows.items()})


if __name__ == "__main__":
    main()
