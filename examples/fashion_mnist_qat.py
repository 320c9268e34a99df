"""A small ResNet on Fashion-MNIST, trained in float32 and then with quantized weights and inputs.

The network (flax linen, 145k weights, batch norms and all) knows nothing of quantization: its loss
is lifted, and takes the view that a compression makes of its parameters. For each seed float32 is
trained first; every variant, float32 among them, starts from these weights and trains on for the
same number of epochs with the same schedule. As in most papers the first and the last layer keep
8 bits, weights and inputs, a step per channel and per image; what meets the others are results of
ReLU, never negative, hence unsigned codes. Accuracy is that of the stored form: integer codes.

    float32   trained on without quantization
    w4a4      LSQ: int4 weights, a step per channel; uint4 inputs, a step per layer
    w2a2      LSQ: int2 weights, uint2 inputs
    w3a4      DoReFa: eight levels of squashed weights; PACT: uint4 inputs, clipped where it learns
    w1        binary weights, sign(w) mean|w| per channel; float32 inputs, in the outer layers too
    w8a8g8    all layers: int8 weights and inputs; cotangents too in the backward pass

    python -m examples.fashion_mnist_qat --out results.json --resume   # three seeds, or the rest
    python -m examples.fashion_mnist_qat --quick                       # a minute, to see it run
"""

import argparse
import json
import sys
import time
from pathlib import Path

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
from examples.data import fashion_mnist
from examples.models import resnet

BATCH = 128


def recipes():
    """How each variant treats each layer; None for float32."""
    with_edges = lambda edge, inner: jc.chain(
        {"stem/kernel": edge, "head/kernel": edge, "Block_*/*/kernel": inner}
    )
    int8 = jc.quantize("int8", activations="int8")
    return {
        "float32": None,
        "w4a4": with_edges(int8, jc.lsq("int4", activations=jc.activations("uint4", "learned"))),
        "w2a2": with_edges(int8, jc.lsq("int2", activations=jc.activations("uint2", "learned"))),
        "w3a4": with_edges(int8, jc.dorefa("odd3", activations=jc.activations("uint4", "clipped"))),
        "w1": with_edges(jc.quantize("int8"), jc.quantize("binary")),
        "w8a8g8": jc.quantize("int8", activations="int8", backward="int8", where="**/kernel"),
    }


def augment(key, images):
    """Bytes to [0, 1], each image shifted by up to two pixels, every other one mirrored."""
    shift_key, flip_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    corners = jax.random.randint(shift_key, (len(images), 2), 0, 5)
    crop = jax.vmap(lambda image, at: lax.dynamic_slice(image, (*at, 0), images.shape[1:]))
    shifted = crop(padded, corners)
    flip = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    return jnp.where(flip, shifted[:, :, ::-1], shifted) / np.float32(255)


def train(params, batch_stats, data, key, epochs, on_step, c=None, found=None):
    """Trains with one cycle of the learning rate, through the view of a compression or plain.

    `data` are images, bytes (n, 28, 28, 1), and labels, (n,); `found`, what `uses` and `calibrate`
    have found, as keywords. Returns parameters, running averages, the state of the optimizer, and
    seconds per epoch.
    """
    steps = epochs * (count := len(data[1]) // BATCH)
    cycle = lambda top: optax.warmup_cosine_decay_schedule(0, top, steps // 10, steps)
    kernels = lambda params: jax.tree.map(lambda w: w.ndim > 1, params)
    decay = optax.add_decayed_weights(5e-4, kernels)
    tx = optax.chain(decay, optax.sgd(cycle(0.05), momentum=0.9, nesterov=True))
    loss, view = resnet.objective, lambda params, opt_state: params
    if c is not None:
        tx = jc.compressed_training(tx, c, learned=optax.adam(cycle(3e-4)), **found)
        loss, view = jc.lift(resnet.objective, on_fallback="error"), c.view

    # Not a scan over the steps: XLA's convolutions on CPU are some twenty times slower in a loop.
    @jax.jit
    def step(params, batch_stats, opt_state, data, order, key, i):
        rows = lax.dynamic_slice_in_dim(order, i * BATCH, BATCH)
        images = augment(jax.random.fold_in(key, i), data[0][rows])
        seen = view(params, opt_state)
        grads, batch_stats = jax.grad(loss, has_aux=True)(seen, batch_stats, images, data[1][rows])
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), batch_stats, opt_state

    now, seconds = (params, batch_stats, tx.init(params)), []
    for epoch_key in jax.random.split(key, epochs):
        order, begin = jax.random.permutation(epoch_key, len(data[1])), time.perf_counter()
        for i in range(count):
            now = step(*now, data, order, epoch_key, i)
            # Steps are dispatched ahead of their results: without waiting, progress would be a lie.
            jax.block_until_ready(now)
            on_step()
        seconds.append(time.perf_counter() - begin)
    # The first epoch compiles.
    return *now, min(seconds)


def accuracy(params, batch_stats, data, batch=1000):
    """In percent of all images, by parameters in their stored form."""
    parts = ([x[i : i + batch] for x in data] for i in range(0, len(data[1]), batch))
    batches = (((batch_stats, images / np.float32(255)), labels) for images, labels in parts)
    # An operation that needs a dense kernel is an error.
    found = jc.evaluate(resnet.logits, params, batches, ["accuracy"], on_fallback="error")
    return 100 * found["accuracy"]


def run(seed, wanted, epochs, data, progress):
    """Trains float32, and each wanted variant from there; yields a row of figures for each."""
    training, test = data
    init_key, float_key, key = jax.random.split(jax.random.key(seed), 3)
    variables = resnet.MODEL.init(init_key, training[0][:1] / np.float32(255))
    params, batch_stats = variables["params"], variables["batch_stats"]

    def bar(name, count):
        task = progress.add_task(f"seed {seed}, {name}", total=count * (len(training[1]) // BATCH))
        return lambda: progress.advance(task)

    on_step = bar("from scratch", epochs[0])
    params, batch_stats, *_ = train(params, batch_stats, training, float_key, epochs[0], on_step)
    batches = [training[0][i : i + BATCH] / np.float32(255) for i in range(0, 8 * BATCH, BATCH)]
    seen, measures = (
        [(batch_stats, x) for x in batches],
        (jc.measures.ranges(), jc.measures.means()),
    )
    found = {
        "uses": jc.uses(resnet.logits, params, batch_stats, batches[0]),
        "stats": jc.calibrate(resnet.logits, params, seen, measures=measures),
    }
    for name in wanted:
        c, on_step = recipes()[name], bar(name, epochs[1])
        plain = params if c is None else jc.compress(params, c, **found)
        row = {"seed": seed, "variant": name, "before": accuracy(plain, batch_stats, test)}
        state = train(params, batch_stats, training, key, epochs[1], on_step, c, found)
        new, averages, opt_state, seconds = state
        small = new if c is None else jc.compress(new, c, state=opt_state)
        total = jc.report(new, small)["total"]
        row |= {"accuracy": accuracy(small, averages, test), "bytes": total["stored_bytes"]}
        row |= {"ratio": total["ratio"], "bits": total["bits_per_weight"]}
        row |= {"seconds": round(seconds, 1)}
        yield row


def load():
    """Images, bytes (n, 28, 28, 1), and labels, (n,), for training and for testing."""
    return [[jnp.asarray(x[..., None]), jnp.asarray(y)] for x, y in fashion_mnist()]


def show(rows):
    """The table for people: means over seeds, and changes to float32 of the same seeds."""
    float32 = {row["seed"]: row["accuracy"] for row in rows if row["variant"] == "float32"}
    table = Table(title="Fashion-MNIST, test accuracy in percent", box=box.SIMPLE_HEAD, padding=0)
    for title in "variant|mean|std|change|each seed|untrained|bytes|ratio|bits".split("|"):
        table.add_column(title, justify="left" if title == "variant" else "right")
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        each, before = ([row[key] for row in mine] for key in ("accuracy", "before"))
        change = np.mean([row["accuracy"] - float32.get(row["seed"], np.nan) for row in mine])
        std = np.std(each, ddof=1) if len(each) > 1 else np.nan
        figures = [f"{np.mean(each):.2f}", f"{std:.2f}", f"{change:+.2f}"]
        figures += [" ".join(f"{x:.2f}" for x in each), f"{np.mean(before):.2f}"]
        figures += [f"{mine[0]['bytes']:,}", *(f"{mine[0][k]:.2f}" for k in ("ratio", "bits"))]
        table.add_row(name, *figures)
    Console().print(table)


def main():
    """Runs what is wanted and not there yet, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(recipes()), choices=list(recipes()))
    parser.add_argument("--epochs", type=int, nargs=2, default=[5, 2], help="float32, variants")
    parser.add_argument("--quick", action="store_true", help="one seed, two variants, few images")
    parser.add_argument("--out", type=Path, help="write results to this JSON, run by run")
    parser.add_argument("--resume", action="store_true", help="skip what --out holds already")
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    args = parser.parse_args()
    data = load()
    if args.quick:
        args.seeds, args.variants, args.epochs = [0], ["float32", "w4a4"], [1, 1]
        data = [[x[:n] for x in part] for part, n in zip(data, (6400, 1000), strict=True)]

    rows, results = [], {"epochs": args.epochs, "images": len(data[0][1])}
    if args.resume and args.out and args.out.exists():
        kept = json.loads(args.out.read_text())
        rows = kept.pop("rows")
        if kept != results:
            sys.exit(f"{args.out} holds runs of other epochs")
    results["rows"] = rows
    with Progress(disable=args.json) as progress:
        for seed in args.seeds:
            done = [row["variant"] for row in rows if row["seed"] == seed]
            wanted = [name for name in args.variants if name not in done]
            for row in run(seed, wanted, args.epochs, data, progress) if wanted else ():
                rows.append(row)
                if args.out:
                    args.out.write_text(json.dumps(results, indent=1))
    if args.json:
        return print(json.dumps(results))
    show(rows)


if __name__ == "__main__":
    main()
