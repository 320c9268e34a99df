"""Every score on one network: how good is what it keeps, at once and after an epoch of training?

A LeNet-300-100 is trained on Fashion-MNIST. Then its weights are pruned by each score in turn, or
its hidden units by scores of units, and accuracy is measured right after pruning and again after
fine-tuning through the mask. The ways of pruning while training get as many epochs. Figures are
those of the stored form, on the 10000 test images.

    python -m examples.scores [--sparsity 0.9] [--units 0.5] [--epochs 6] [--tuning 1]
"""

import argparse
import json

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import jaxopt_compress as jc
from examples.data import fashion_mnist
from examples.models.lenet import WEIGHTS, apply_300_100, init_300_100
from examples.models.training import batches, cross_entropy, train

HIDDEN, READERS = ("dense1/kernel", "dense2/kernel"), ("dense2/kernel", "head/kernel")
RATE = 1e-3  # of fine-tuning
MEASURES = (jc.measures.moments(), jc.measures.means(), jc.measures.zeros(), jc.measures.fisher())
T = jc.schedules


def loss(params, images, labels):
    """The mean cross-entropy."""
    return cross_entropy(apply_300_100)(params, None, images, labels)[0]


def of_weights(params, sample, sparsity):
    """Name -> compression that decides once, on the trained network."""
    s, ones = jc.scores, jnp.ones((1, 28, 28))
    scores = {
        "random": (s.random(jax.random.key(0)), "leaf"),
        "magnitude": (s.magnitude(), "leaf"),
        "magnitude, global": (s.magnitude(), "global"),
        "lamp": (s.lamp(), None),
        "wanda": (s.wanda(), None),
        "fisher": (s.fisher(), "global"),
        "snip": (s.given(s.snip(loss, params, *sample)), "global"),
        "grasp": (s.given(s.grasp(loss, params, *sample), signed=True), "global"),
        "synflow": (s.given(s.synflow(apply_300_100, params, ones)), "global"),
    }
    schedule = T.constant(sparsity)
    return {
        name: jc.prune(score, schedule, where=WEIGHTS, scope=scope)
        for name, (score, scope) in scores.items()
    }


def of_units(sparsity):
    """Name -> compression of hidden units: columns of one kernel, or rows of the next."""
    s = jc.scores
    scores = {
        "random": (s.random(jax.random.key(0)), "channels", HIDDEN),
        "magnitude of outputs": (s.magnitude(), "channels", HIDDEN),
        "fpgm": (s.fpgm(), "channels", HIDDEN),
        "magnitude of inputs": (s.magnitude(), "inputs", READERS),
        "apoz": (s.apoz(), "inputs", READERS),
        "mean_activation": (s.mean_activation(), "inputs", READERS),
    }
    schedule = T.constant(sparsity)
    return {
        name: jc.prune(score, schedule, pattern, where=list(where))
        for name, (score, pattern, where) in scores.items()
    }


def in_training(sparsity, steps):
    """Name -> what `train` takes: sparsity that rises, or is found, while the network trains."""
    s, begin, end = jc.scores, steps // 10, steps * 7 // 10
    rising, phase = T.polynomial(sparsity, begin, end, every=20), steps // 8
    all_steps = T.constant(sparsity, every=1)
    cycles = T.cyclic(sparsity, dense=phase, sparse=phase, begin=begin, end=end)
    lasso = lambda rate: optax.chain(optax.adamw(rate), jc.proximal.l1(2e-5, where=WEIGHTS))
    inputs = jc.proximal.group_lasso(2e-5, "inputs", where=WEIGHTS)
    linear = optax.linear_schedule(0.0, sparsity, end - begin, begin)
    prune = lambda score, schedule=rising, **own: {
        "compression": jc.prune(score, schedule, where=WEIGHTS, **own)
    }
    return {
        "magnitude, cubic": prune(s.magnitude()),
        "magnitude, exponential": prune(
            s.magnitude(), T.exponential(sparsity, begin, end, every=20)
        ),
        "magnitude, linear": prune(s.magnitude(), T.from_optax(linear, every=20)),
        "saliency": prune(s.saliency()),
        "fisher, running": prune(s.fisher(decay=0.99)),
        "movement": prune(s.movement(), backward="straight_through"),
        "top-k, straight-through": prune(s.magnitude(), all_steps, backward="straight_through"),
        "AC/DC": prune(s.magnitude(), cycles, pruned="zero"),
        "L1 steps, then magnitude": prune(s.magnitude(), T.one_shot(sparsity, end))
        | {"optimizer": lasso},
        "group lasso of inputs, then magnitude": prune(s.magnitude(), T.one_shot(sparsity, end))
        | {"optimizer": lambda rate: optax.chain(optax.adamw(rate), inputs)},
        "grown by momentum": prune(
            s.random(jax.random.key(1)),
            T.constant(sparsity, every=20),
            grow=jc.grow.by_momentum(0.3, start=s.random(jax.random.key(1))),
        ),
        "soft thresholds": {
            "compression": jc.soft_threshold(WEIGHTS, initial=-3.0),
            "penalty": 1e-3,
        },
    }


def figures(small, test):
    """Accuracy of the stored form, its bytes, and the share of zeros in its kernels."""
    accuracy = jc.evaluate(apply_300_100, small, batches(*test), ["accuracy"])["accuracy"]
    kernels = [x for x in jax.tree.leaves(jc.materialize(small)) if x.ndim > 1]
    zeros = sum(int(jnp.sum(x == 0)) for x in kernels) / sum(x.size for x in kernels)
    return {"accuracy": 100 * accuracy, "zeros": 100 * zeros, "bytes": jc.nbytes(small)}


def run(training, test, sparsity, units, epochs, tuning):
    """A row of figures for each method."""
    data, objective = training, cross_entropy(apply_300_100)
    params, _ = train(objective, init_300_100(jax.random.key(0)), *data, epochs)
    yield {"kind": "dense", "method": ""} | figures(params, test)
    sample = jnp.asarray(data[0][:1024]), jnp.asarray(data[1][:1024], jnp.int32)
    uses = jc.uses(apply_300_100, params, sample[0][:2])
    # Fisher information is that of gradients of small batches; of one large batch it is SNIP.
    parts = [tuple(x[i : i + 16] for x in sample) for i in range(0, 1024, 16)]
    stats = jc.calibrate(loss, params, parts, measures=MEASURES)
    kinds = {"weights": of_weights(params, sample, sparsity), "units": of_units(units)}
    for kind, methods in kinds.items():
        for name, c in methods.items():
            at_once = jc.compress(params, c, uses=uses, stats=stats)
            small, _ = train(
                objective, params, *data, tuning, rate=RATE, compression=c, uses=uses, stats=stats
            )
            before = figures(at_once, test)["accuracy"]
            yield {"kind": kind, "method": name, "before": before} | figures(small, test)
    steps = tuning * (len(data[1]) // 128)
    for name, own in in_training(sparsity, steps).items():
        small, _ = train(objective, params, *data, tuning, rate=RATE, uses=uses, **own)
        yield {"kind": "in training", "method": name} | figures(small, test)


def main(argv=None):
    """Trains the network, prunes it in every way, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.9, help="of weights")
    parser.add_argument("--units", type=float, default=0.5, help="of hidden units")
    parser.add_argument("--epochs", type=int, default=6, help="of the dense network")
    parser.add_argument("--tuning", type=int, default=1, help="epochs with each method")
    parser.add_argument("--images", type=int, default=60000, help="to train with")
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    args = parser.parse_args(argv)
    training, test = fashion_mnist()
    training = [x[: args.images] for x in training]
    rows = list(run(training, test, args.sparsity, args.units, args.epochs, args.tuning))
    if args.json:
        print(json.dumps(rows))
        return rows
    table = Table(title=f"LeNet-300-100 on Fashion-MNIST, {args.tuning} epochs of fine-tuning")
    for column in ("pruned", "by", "accuracy % at once", "tuned", "zeros %", "bytes"):
        table.add_column(column, justify="left" if column in ("pruned", "by") else "right")
    for row in rows:
        before = f"{row['before']:.2f}" if "before" in row else ""
        cells = f"{row['accuracy']:.2f}", f"{row['zeros']:.1f}", f"{row['bytes']:,}"
        table.add_row(row["kind"], row["method"], before, *cells)
    Console().print(table)
    return rows


if __name__ == "__main__":
    main()
