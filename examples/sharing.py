"""Ways to share values: where k-means begins, what has a codebook, vectors, sums, soft sharing.

LeNet-300-100 on MNIST, its kernels stored as codes of a few values. Each variant is measured as it
is found, and after its centroids were trained on; soft sharing begins with the dense network and
finds its values in training, with most of its entries at 0. Beside the bytes of codes stand those
that static ANS leaves of them; int4 and int2 are for comparison.

    python -m examples.sharing
    python -m examples.sharing --variants "16 values, *" --tune 1
"""

import argparse
import fnmatch
import json

import jax
import numpy as np

import jaxopt_compress as jc
from examples.data import mnist
from examples.models import lenet
from examples.models.training import batches, cross_entropy, train
from examples.results import show

KERNELS = "*/kernel"


def variants():
    """Name -> compression."""
    share = lambda clusters, *args, **given: jc.share(clusters, *args, where=KERNELS, **given)
    begins = {name: {"init": name} for name in ("linear", "density", "kmeans++", "random")}
    found = {f"int{b}": jc.quantize(f"int{b}", where=KERNELS) for b in (4, 2)}
    for name, given in begins.items():
        keyed = {"key": jax.random.key(0)} if name in ("kmeans++", "random") else {}
        for clusters in (16, 4):
            found[f"{clusters} values, {name}"] = share(clusters, **given, **keyed)
    return found | {
        "16 values, by channel": share(16, per="channel"),
        "4 values, by channel": share(4, per="channel"),
        "256 vectors of 4": share(256, vector=4),
        "sums of 256 and 256 vectors of 4": share(256, vector=4, codebooks=2),
        "soft sharing, 16": jc.soft_share(16, where=KERNELS),
    }


def main(argv=None):
    """Trains float32, then each variant, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5, help="of float32")
    parser.add_argument("--tune", type=int, default=2, help="more epochs, of each variant")
    parser.add_argument("--soft", type=int, default=20, help="epochs of soft sharing")
    parser.add_argument("--images", type=int, default=60000, help="to train with")
    parser.add_argument("--variants", nargs="*", default=["*"], help="globs")
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    args = parser.parse_args(argv)
    (images, labels), held_out = mnist()
    images, labels, test = images[: args.images], labels[: args.images], batches(*held_out)
    apply, objective = lenet.apply_300_100, cross_entropy(lenet.apply_300_100)
    score = lambda tree: jc.evaluate(apply, tree, test, ["accuracy"])["accuracy"]
    fit = lambda params, epochs, **given: train(objective, params, images, labels, epochs, **given)[
        0
    ]
    params = fit(lenet.init_300_100(jax.random.key(0)), args.epochs)
    uses = jc.uses(apply, params, test[0][0])
    found = {"float32": {"bytes": jc.nbytes(params), "accuracy": score(params)}}
    for name, compression in variants().items():
        if not any(fnmatch.fnmatch(name, glob) for glob in args.variants):
            continue
        soft = name.startswith("soft")
        # The paper's weight of the penalty, in a mean over examples.
        penalty = {"penalty": 0.005 / len(labels)} if soft else {}
        row = {"untrained": score(jc.compress(params, compression, uses=uses))}
        epochs = args.soft if soft else args.tune
        small = fit(params, epochs, rate=5e-4, compression=compression, uses=uses, **penalty)
        row |= {"bytes": jc.nbytes(small), "coded": jc.coded_bytes(small), "accuracy": score(small)}
        kernels = [w for w in jax.tree.leaves(jc.materialize(small)) if w.ndim > 1]
        zeros = sum(int(np.sum(w == 0)) for w in map(np.asarray, kernels))
        found[name] = row | {"zeros": zeros / sum(w.size for w in kernels)}
    if args.json:
        print(json.dumps(found))
        return found
    forms = {"bytes": ",", "coded": ","} | dict.fromkeys(("zeros", "untrained", "accuracy"), ".2%")
    cells = lambda row: [f"{row[k]:{form}}" if k in row else "" for k, form in forms.items()]
    show("MNIST, LeNet-300-100", list(forms), {name: cells(row) for name, row in found.items()})
    return found


if __name__ == "__main__":
    main()
