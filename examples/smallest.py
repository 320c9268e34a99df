"""The smallest model within a bound on quality, and the frontier from the same measurements.

The bound is kept on held-out data of the search; printed is also the quality on the test part, that
no choice has seen.

    python -m examples.smallest lenet         # accuracy on MNIST falls by 0.2 points at most
    python -m examples.smallest movielens     # rmse rises by 0.005 at most
    python -m examples.smallest bbc           # a GRU on BBC news: accuracy falls by a point at most
    python -m examples.smallest minilm        # rank correlation on STS falls by 0.005 at most
    jaxopt-compress auto examples.smallest:lenet out --recipe recipe.toml
"""

import argparse
import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_compress as jc
from examples import allocation_cases, data, movielens, text_flow
from examples.fetching import fetch
from examples.models import lenet as networks
from examples.models import minilm as sentences
from examples.models.training import batches, cross_entropy, train

KEYS = ("fn", "params", "batches", "loss", "within", "held_out", "candidates", "measured")


def grouped(*bits, size=None):
    """Tables of a recipe file, so that what is found can be written as one."""
    steps = {"scale_dtype": "bfloat16"} | ({"group_size": size} if size else {})
    return {f"int{b}": {"quantize": {"format": f"int{b}", **steps}} for b in bits}


@functools.cache
def _lenet(epochs=3):
    (images, labels), test = data.mnist()
    apply, objective = networks.apply_300_100, cross_entropy(networks.apply_300_100)
    params = networks.init_300_100(jax.random.key(0))
    params, _ = train(objective, params, images[:50000], labels[:50000], epochs)
    return {
        "fn": apply,
        "params": params,
        "batches": batches(images[:4000], labels[:4000]),
        "loss": lambda params, x, y: objective(params, None, x, y)[0],
        "within": {"accuracy": -0.002},
        "held_out": batches(images[50000:], labels[50000:]),
        "candidates": grouped(2, 3, 4)
        | {
            "int8": {"quantize": {"format": "int8"}},
            "80%, int4": {"prune": {"sparsity": 0.8}, "quantize": {"format": "int4"}},
        },
        "measured": 3,
        "test": batches(*test),
    }


@functools.cache
def _movielens(epochs=10):
    seen, later = movielens.split(data.ml100k()[0])
    # Every other user's held-out ratings choose, and those of the others test.
    choose = later[:, 0] % 2 == 0
    params = movielens.fit(movielens.init(jax.random.key(0)), seen, epochs, 1e-2)
    count = 8 * 2048
    rows = seen[np.random.default_rng(0).permutation(len(seen))[:count]].reshape(8, 2048, 4)
    return {
        "fn": movielens.apply,
        "params": params,
        "batches": [(r[:, 0], r[:, 1], r[:, 2].astype(np.float32)) for r in rows],
        "loss": lambda params, u, f, r: jnp.mean(jnp.square(movielens.apply(params, u, f) - r)),
        "within": {"rmse": 0.005},
        "held_out": movielens.rating_batches(later[choose]),
        "candidates": grouped(2, 3, 4, size=16) | {"int8": {"quantize": {"format": "int8"}}},
        "measured": 3,
        "test": movielens.rating_batches(later[~choose]),
    }


@functools.cache
def _bbc(epochs=6):
    (ids, labels), test = text_flow.split(data.bbcnews())
    chooses = np.arange(len(labels)) % 5 == 0
    training = ids[~chooses], labels[~chooses]
    init, apply = text_flow.MODELS["gru"]
    params = text_flow.fit(apply, init(jax.random.key(0)), training, epochs, 3e-3)
    return {
        "fn": apply,
        "params": params,
        "batches": batches(*training, 100),
        "loss": lambda params, ids, labels: jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(apply(params, ids), labels)
        ),
        # One article is 0.3 points: the cross-entropy sees smaller changes.
        "within": {"accuracy": -0.01, "cross_entropy": 0.02},
        "held_out": batches(ids[chooses], labels[chooses], 85),
        "candidates": grouped(2, 3, 4, size=32)
        | {
            "int8": {"quantize": {"format": "int8"}},
            "50%, int4": {"prune": {"sparsity": 0.5}, "quantize": {"format": "int4"}},
        },
        "measured": 2,
        "test": batches(*test, 107),
    }


@functools.cache
def _minilm(count=64):
    folder = fetch("minilm")
    tokenize, params = sentences.tokenizer(folder), sentences.load(folder)
    loss, made = allocation_cases.moved(sentences.apply, params)
    return {
        "fn": sentences.similarity,
        "params": params,
        "batches": list(map(made, allocation_cases.sentences(tokenize, count))),
        "loss": loss,
        "within": {"spearman": -0.005},
        "held_out": sentences.pairs(tokenize, "dev"),
        "candidates": grouped(2, 3, 4, 8, size=64),
        "measured": 1,
        "test": sentences.pairs(tokenize),
    }


TASKS = {"lenet": _lenet, "movielens": _movielens, "bbc": _bbc, "minilm": _minilm}


def _arguments(name):
    made = TASKS[name]()
    return {key: made[key] for key in KEYS}


# What the command `jaxopt-compress auto` takes.
lenet = functools.partial(_arguments, "lenet")
movie = functools.partial(_arguments, "movielens")
bbc = functools.partial(_arguments, "bbc")
minilm = functools.partial(_arguments, "minilm")


def from_file(recipe):
    """The recipe as a file says it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.toml")
        path.write_text(recipe)
        return jc.read_recipe(path)


def same(a, b):
    """Whether two trees hold the same bits."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


def main(argv=None):
    """Searches, and prints what was tried and the frontier."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--shares", type=float, nargs="*", default=[0.25, 0.2, 0.15])
    parser.add_argument("--traffic", action="store_true", help="shares of bytes read by a call")
    parser.add_argument("--evaluations", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="print one JSON line, not tables")
    args = parser.parse_args(argv)
    task, given = TASKS[args.task](), _arguments(args.task)
    found = jc.auto(**given, evaluations=args.evaluations)
    if not args.json:
        print(found)
    metrics, test = list(given["within"]), task["test"]
    score = lambda params: jc.evaluate(given["fn"], params, test, metrics)
    unseen = {"dense": score(given["params"]), "found": score(found.params)}
    inputs = test[0][0]
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    uses = jc.uses(given["fn"], given["params"], *inputs)
    budgets = [(jc.traffic if args.traffic else jc.bytes)(share) for share in args.shares]
    points = jc.frontier(
        given["fn"], given["params"], found.table, budgets, test, metrics, uses=uses
    )
    if args.json:
        trials = [trial._replace(recipe=trial.recipe.choices)._asdict() for trial in found.trials]
        print(json.dumps({"trials": trials, "test": unseen, "frontier": points}))
        return found
    print(f"\nof {jc.nbytes(found.params):,} bytes; on the test part {unseen}\n\n{points}")
    print(f"\n{found.toml()}" if found.met else "no recipe keeps the bound")
    again = jc.compress(given["params"], from_file(found.toml()), uses=uses)
    print(f"the recipe, read from a file, gives the same model: {same(again, found.params)}")
    return found


if __name__ == "__main__":
    main()
