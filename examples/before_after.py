"""What compression changes besides accuracy: LeNet-5 on Fashion-MNIST, before and after.

The network is trained in float32, and compressed without further training: to int8, and to int4
after half of its weights were pruned. Compared are accuracy by class, calibration, robustness to
noise, blur and missing pixels, what answers depend on, how much of the training set shows, and
which of the differences are noise.

    python -m examples.before_after                          # some minutes on one core
    python -m examples.before_after --quick                  # a minute, to see it run
    python -m examples.before_after --html report.html --json
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxopt_compress as jc
from examples.data import fashion_mnist
from examples.models import lenet
from examples.models.training import batches, cross_entropy, train

METRICS = ["accuracy", "f1_macro", "auc", "calibration_error", "cross_entropy", "per_class"]
RECIPE = """
int8:         **/kernel: quantize("int8")
pruned int4:  **/kernel: prune(magnitude, 0.5), then quantize("int4")
"""


def recipes():
    """Name -> compression."""
    half = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), where="**/kernel")
    int4 = jc.quantize("int4", where="**/kernel")
    return {"int8": jc.quantize("int8", where="**/kernel"), "pruned int4": jc.chain(half, int4)}


def pixels(params, images):
    """LeNet-5 of images, bytes or floats, (n, 28, 28)."""
    return lenet.apply_5(params, images)


def run(data, epochs=6, rounds=11):
    """The plan, the comparison and the reports."""
    (images, labels), test = data
    learn = cross_entropy(pixels)
    params, _ = train(learn, lenet.init_5(jax.random.key(0)), images, labels, epochs)
    held_out = batches(*test)
    uses = jc.uses(pixels, params, held_out[0][0])
    stats = jc.calibrate(pixels, params, [held_out[0][0]])
    plans, variants = {}, {"float32": params}
    for name, compression in recipes().items():
        plans[name] = jc.plan(pixels, params, compression, held_out[0][0][:1], chip="tpu v5e")
        variants[name] = jc.compress(params, compression, uses=uses)
    count = len(test[1])
    found = jc.compare(
        pixels,
        variants,
        held_out,
        METRICS,
        rounds=rounds,
        on_fallback="error",
        corruptions={
            "noise": jc.corruptions.noise(40.0),
            "blur": jc.corruptions.blur(1.0),
            "gaps": jc.corruptions.dropout(0.3),
        },
        key=jax.random.key(1),
        attribution=True,
        members=batches(images[:count], labels[:count]),
        stats=stats,
    )
    reports = {
        name: jc.report(params, small, stats=stats, histograms=41)
        for name, small in variants.items()
        if name != "float32"
    }
    return plans, found, reports


def main():
    """Trains, compresses, and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument(
        "--html", type=Path, default=Path("report.html"), help="where it is written"
    )
    parser.add_argument("--quick", action="store_true", help="one epoch of few images")
    parser.add_argument("--json", action="store_true", help="print one JSON line, not tables")
    args = parser.parse_args()
    data = [[jnp.asarray(x) for x in part] for part in fashion_mnist()]
    if args.quick:
        args.epochs = 1
        data = [[x[:n] for x in part] for part, n in zip(data, (6400, 1000), strict=True)]
    plans, found, reports = run(data, args.epochs)
    found.html(args.html, title="LeNet-5, before and after", recipe=RECIPE.strip(), reports=reports)
    if args.json:
        return print(json.dumps({"plans": plans, "comparison": found, "reports": reports}))
    for name, plan in plans.items():
        print(f"the plan for {name}\n{plan}\n")
    print(found)
    for name, row in found.items():
        for metric, own in row.get("paired", {}).items():
            word = "noise" if own["noise"] else "more than noise"
            print(f"{name}, {metric}: {own['difference']:+.4f}, p = {own['p']:.2g}, {word}")


if __name__ == "__main__":
    main()
