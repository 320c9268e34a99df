"""A small network on Fashion-MNIST loses channels until half of its operations are left.

The networks know nothing of removal: a ResNet (flax linen, 145k weights, batch norms and all), and
a vision transformer (plain functions, 205k weights), which loses heads, hidden units and indices of
its width. Groups are found in the training objective, in which the running averages of batch norms
shrink with the parameters. The units with the smallest weights go, and the smaller network is
trained on; beside it the whole one trains on for as long, with the same schedule. Convolutions of
29 channels take a CPU as long as those of 32: `--round-to 16` keeps multiples of 16. Of the ResNet
both are timed with their norms folded, too.

    python -m examples.fashion_resnet_removal --round-to 16  # some minutes on two cores
    python -m examples.fashion_resnet_removal --model vit
    python -m examples.fashion_resnet_removal --speed 1 8 16 # processor time beside the whole one
    python -m examples.fashion_resnet_removal --quick        # a minute, to see it run
"""

import argparse
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.table import Table

import jaxopt_compress as jc
from examples.data import fashion_mnist
from examples.models import resnet, vit
from examples.models.training import batches, cross_entropy, train
from jaxopt_compress.evaluation.timing import interleave, median


def objective(params, averages, images, labels):
    """The mean cross-entropy of images, bytes (n, 28, 28), and the new running averages."""
    return resnet.objective(params, averages, images[..., None] / jnp.float32(255), labels)


def logits(params, averages, images):
    """The answers of the trained network, (n, 10)."""
    return resnet.logits(params, averages, images[..., None] / jnp.float32(255))


def begin_resnet(key):
    """Parameters and running averages."""
    variables = resnet.MODEL.init(key, jnp.zeros((1, 28, 28, 1)))
    return variables["params"], variables["batch_stats"]


def vit_logits(params, averages, images):
    """The answers of the transformer, which has no averages."""
    del averages
    return vit.apply(params, images)


MODELS = {
    "resnet": (begin_resnet, objective, logits),
    "vit": (lambda key: (vit.init(key), None), cross_entropy(vit.apply), vit_logits),
}


def figures(fn, params, averages, test):
    """Accuracy in percent and the bytes of the parameters."""
    state = {"params": params, "averages": averages}
    run = lambda state, images: fn(state["params"], state["averages"], images)
    accuracy = jc.evaluate(run, state, batches(*test), ["accuracy"])["accuracy"]
    return {"accuracy": 100 * accuracy, "bytes": jc.nbytes(params)}


def folded(variant, images):
    """The variant without its batch norms, which are folded into convolutions."""
    fn, params, averages = variant
    run = lambda state, images: fn(state["params"], state["averages"], images)
    fold = jc.fold_norms(run, {"params": params, "averages": averages}, images)
    g, new = fold.function(run), fold.params
    own = lambda params, averages, images: g({"params": params, "averages": averages}, images)
    return own, new["params"], new["averages"]


def throughput(variants, images, rounds):
    """Name -> images per second, with an interval; variants take turns."""
    runs = {
        name: functools.partial(jax.jit(fn), *state, images)
        for name, (fn, *state) in variants.items()
    }
    times = interleave(runs, rounds)
    per_second = lambda t: len(images) / t
    found = {name: median(samples.wall) for name, samples in times.items()}
    return {k: [per_second(t) for t in (e.median, e.high, e.low)] for k, e in found.items()}


def run(data, share=0.5, epochs=(3, 2), rounds=15, round_to=1, model="resnet"):
    """Variant -> its figures: before training on and after it, whole and smaller."""
    (images, labels), test = data
    begin, objective, logits = MODELS[model]
    params, averages = begin(jax.random.key(0))
    params, averages = train(objective, params, images, labels, epochs[0], averages)
    batch = jnp.asarray(images[:128]), jnp.asarray(labels[:128], jnp.int32)
    follow = None if averages is None else ("in/0/**", "out/1/**")
    groups = jc.find_groups(objective, params, averages, *batch, follow=follow)
    plan = groups.plan(budget=jc.flops(share), round_to=round_to)
    rewrite = plan.rewrite(params)
    plan.check(params, averages, *batch, tolerance=1e-3)
    small_logits, small = rewrite.function(logits), (rewrite.params, rewrite.argument(0, averages))

    whole_on = train(objective, params, images, labels, epochs[1], averages)
    start, own = rewrite.params, small[1]
    small_on = train(rewrite.function(objective), start, images, labels, epochs[1], own)

    variants: dict[str, Any] = {
        "whole": (logits, params, averages),
        "whole, trained on": (logits, *whole_on),
        "smaller": (small_logits, *small),
        "smaller, trained on": (small_logits, *small_on),
    }
    timed = ["whole, trained on", "smaller, trained on"]
    if averages is not None:
        for name in list(timed):
            variants[f"{name}, folded"] = folded(variants[name], batch[0][:2])
        timed += [f"{name}, folded" for name in timed]
    rows = {name: figures(*own, test=test) for name, own in variants.items()}
    timed = {name: variants[name] for name in timed}
    speeds = throughput(timed, jnp.asarray(images[:256]), rounds)
    for name, row in rows.items():
        # Forward pass of the objective, per image.
        row["flops"] = plan.flops[name.startswith("smaller")] // len(batch[0])
        row["images_per_second"] = speeds.get(name)
    return groups, plan, rows


def speeds(multiples, share, rounds):
    """Prints how fast the untrained ResNet gets if multiples of channels are kept."""
    params, averages = begin_resnet(jax.random.key(0))
    images = jax.random.randint(jax.random.key(1), (256, 28, 28), 0, 256).astype(jnp.uint8)
    batch = images[:128], jnp.zeros(128, jnp.int32)
    follow = ("in/0/**", "out/1/**")
    groups = jc.find_groups(objective, params, averages, *batch, follow=follow)
    variants: dict[str, Any] = {"whole": (logits, params, averages)}
    for n in multiples:
        rewrite = groups.plan(budget=jc.flops(share), round_to=n).rewrite()
        small = rewrite.params, rewrite.argument(0, averages)
        variants[f"round_to={n}"] = (rewrite.function(logits), *small)
    # The last block goes first, and channels then.
    cut = groups.plan({"blocks": [len(groups["blocks"]) - 1]})
    whole, shorter = cut.flops[0], cut.rewrite()
    fn, own = shorter.function(objective), shorter.argument(0, averages)
    left = jc.find_groups(fn, shorter.params, own, *batch, follow=follow)
    plan = left.plan(budget=jc.flops(share * whole / cut.flops[1]), round_to=max(multiples))
    rewrite, small = plan.rewrite(), shorter.function(logits)
    variants[f"a block and round_to={max(multiples)}, {plan.flops[1] / whole:.0%}"] = (
        rewrite.function(small),
        rewrite.params,
        rewrite.argument(0, own),
    )
    variants |= {f"{name}, folded": folded(v, images[:2]) for name, v in variants.items()}
    runs = {k: functools.partial(jax.jit(fn), *own, images) for k, (fn, *own) in variants.items()}
    times = interleave(runs, rounds)
    for name, samples in times.items():
        pairs = zip(times["whole"].cpu, samples.cpu, strict=True)
        ratio = median([whole / own for whole, own in pairs])
        print(f"{name:40} {1e3 * median(samples.cpu).median:6.1f} ms  {ratio}", flush=True)


def show(rows):
    """The table for people."""
    table = Table(title="Fashion-MNIST", box=box.SIMPLE_HEAD, padding=0)
    for title in ("", "accuracy %", "FLOPs per image", "bytes", "images/s [95%]"):
        table.add_column(title, justify="right" if title else "left")
    for name, row in rows.items():
        speed = row["images_per_second"]
        shown = "{:,.0f} [{:,.0f}, {:,.0f}]".format(*speed) if speed else ""
        figures = f"{row['accuracy']:.2f}", f"{row['flops']:,}", f"{row['bytes']:,}"
        table.add_row(name, *figures, shown)
    Console().print(table)


def main():
    """Trains, removes, trains on and prints a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="resnet", choices=list(MODELS))
    parser.add_argument("--share", type=float, default=0.5, help="of operations that are left")
    parser.add_argument("--epochs", type=int, nargs=2, default=[3, 2], help="before, after")
    parser.add_argument("--round-to", type=int, default=1, help="channels left are a multiple")
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    parser.add_argument("--quick", action="store_true", help="one epoch each, of few images")
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    parser.add_argument("--speed", type=int, nargs="+", help="multiples to time, untrained")
    args = parser.parse_args()
    if args.speed:
        return speeds(args.speed, args.share, args.rounds)
    data = fashion_mnist()
    if args.quick:
        args.epochs = [1, 1]
        data = [[x[:n] for x in part] for part, n in zip(data, (6400, 1000), strict=True)]
    groups, plan, rows = run(data, args.share, args.epochs, args.rounds, args.round_to, args.model)
    if args.json:
        return print(json.dumps(rows))
    print(groups.table())
    for name, units in plan.units.items():
        print(f"{name}: {len(units)} of {len(groups[name])} go")
    show(rows)


if __name__ == "__main__":
    main()
