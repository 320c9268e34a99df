"""Low rank by training: factors that learn, and ranks that shrink by themselves.

LeNet-300-100 on Fashion-MNIST, its two large kernels as thin factors. A truncated SVD of the
trained network is where to start; its factors learn on. With proximal steps of the nuclear norm
singular values become zero during training, so that the rank follows from the weight of the norm,
and differs from kernel to kernel; the SVD behind them is nearly exact, and its factors learn on.

    python -m examples.low_rank_training
    python -m examples.low_rank_training --weights 0.003 --epochs 3
"""

import argparse
import json

import jax
import optax

import jaxopt_compress as jc
from examples.data import fashion_mnist
from examples.models import lenet
from examples.models.training import batches, cross_entropy, train
from examples.results import show
from jaxopt_compress.tree import named_leaves

KERNELS = ["dense1/kernel", "dense2/kernel"]


def ranks(tree):
    """Of the factors, in the order of the kernels."""
    return [x.rank for _, x in named_leaves(tree) if isinstance(x, jc.LowRankArray)]


def main(argv=None):
    """Trains each variant, and prints accuracy beside ranks and bytes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5, help="of float32, and of proximal steps")
    parser.add_argument("--tune", type=int, default=2, help="more epochs, of factors")
    parser.add_argument("--images", type=int, default=60000, help="to train with")
    parser.add_argument("--ranks", type=int, nargs="*", default=[16, 8, 4])
    parser.add_argument("--weights", type=float, nargs="*", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    args = parser.parse_args(argv)
    (images, labels), held_out = fashion_mnist()
    images, labels, test = images[: args.images], labels[: args.images], batches(*held_out)
    apply, objective = lenet.apply_300_100, cross_entropy(lenet.apply_300_100)
    start = lenet.init_300_100(jax.random.key(0))
    uses = jc.uses(apply, start, test[0][0])
    fit = lambda params, epochs, **given: train(
        objective, params, images, labels, epochs, uses=uses, **given
    )[0]
    found = {}

    def measure(name, params, compression=None):
        small = params if compression is None else jc.compress(params, compression, uses=uses)
        score = lambda tree: jc.evaluate(apply, tree, test, ["accuracy"])["accuracy"]
        row = {"bytes": jc.nbytes(small), "ranks": ranks(small), "accuracy": score(small)}
        # The ranks that were found stay while the factors learn; float32 trains on as long.
        known = {p: jc.low_rank(rank=r) for p, r in zip(KERNELS, row["ranks"], strict=False)}
        fixed = jc.chain(known) if known else None
        row["trained"] = score(fit(params, args.tune, rate=5e-4, compression=fixed))
        found[name] = row

    params = fit(start, args.epochs)
    measure("float32", params)
    for rank in args.ranks:
        measure(f"SVD to rank {rank}", params, jc.low_rank(rank=rank, where=KERNELS))
    for weight in args.weights:
        optimizer = lambda rate, weight=weight: optax.chain(
            optax.adamw(rate, weight_decay=1e-2), jc.proximal.nuclear(weight, where=KERNELS)
        )
        shrunk = fit(start, args.epochs, optimizer=optimizer)
        measure(f"nuclear norm, {weight:g}", shrunk, jc.low_rank(error=1e-3, where=KERNELS))
    if args.json:
        print(json.dumps(found))
        return found
    shares = lambda row: [f"{row[k]:.2%}" for k in ("accuracy", "trained")]
    lines = {
        name: [", ".join(map(str, row["ranks"])), f"{row['bytes']:,}", *shares(row)]
        for name, row in found.items()
    }
    columns = ["ranks", "bytes", "accuracy", "factors trained on"]
    show("Fashion-MNIST, LeNet-300-100", columns, lines)
    return found


if __name__ == "__main__":
    main()
