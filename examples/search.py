"""Hyperparameters of training with compression: validation error against bytes, by Optuna.

A network of one hidden layer on scikit-learn's digits; searched are the number format and its
group, sparsity and when it is reached, learning rate, optimizer, activation function and width. A
trial first trains for a third of the time: if then more than half of the earlier trials that are
not larger were better, it ends there. Several processes share a journal file; a run that was cut
off goes on where it was.

    python -m examples.search --journal search.log                      # some minutes on two cores
    python -m examples.search --journal search.log --trials 200         # goes on, to 200
"""

import argparse
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxopt_compress as jc
from examples.models.common import dense
from examples.models.training import batches, cross_entropy, scaled, train
from jaxopt_compress.extras import require

NAME, BATCH, KERNELS = "digits", 64, "**/kernel"
ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "tanh": jnp.tanh}
OPTIMIZERS = {
    "adamw": lambda rate: optax.adamw(rate, weight_decay=1e-2),
    "sgd": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
}
# The usual rates of the two differ by an order of magnitude.
RATES = {"adamw": (5e-4, 2e-2), "sgd": (5e-3, 0.5)}


def load():
    """Training, validation and test parts: images, (n, 64), and labels."""
    x, y = load_digits(return_X_y=True)
    x = x.astype(np.float32) / 16
    first, test_x, first_y, test_y = train_test_split(x, y, test_size=360, random_state=0)
    parts = train_test_split(first, first_y, test_size=360, random_state=0)
    return (parts[0], parts[2]), (parts[1], parts[3]), (test_x, test_y)


def model(activation, params, x):
    """Logits, (n, 10)."""
    return dense(params["head"], ACTIVATIONS[activation](dense(params["hidden"], x)))


def init(width):
    keys = jax.random.split(jax.random.key(0))
    shapes = {"hidden": (64, width), "head": (width, 10)}
    return {
        name: {"kernel": scaled(k, *shape), "bias": jnp.zeros(shape[1])}
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def asked(trial):
    """What a trial is to try."""
    optimizer = trial.suggest_categorical("optimizer", list(OPTIMIZERS))
    return {
        "width": trial.suggest_int("width", 16, 128, log=True),
        "activation": trial.suggest_categorical("activation", list(ACTIVATIONS)),
        "format": trial.suggest_categorical("format", ["int8", "int4", "int3", "int2"]),
        "group": trial.suggest_categorical("group", [0, 16, 32]),
        "sparsity": trial.suggest_float("sparsity", 0.0, 0.9),
        "end": trial.suggest_float("end", 0.1, 0.8),
        "optimizer": optimizer,
        "rate": trial.suggest_float(f"rate of {optimizer}", *RATES[optimizer], log=True),
    }


def compression(given, steps):
    """Pruning that rises to an end, and rounding; with 0 steps all of it at once."""
    schedule = jc.schedules.constant(given["sparsity"])
    if steps:
        end = max(1, round(given["end"] * steps))
        schedule = jc.schedules.polynomial(given["sparsity"], begin=0, end=end, every=5)
    group = {"group_size": given["group"], "pad": True} if given["group"] else {}
    return jc.chain(
        jc.prune(jc.scores.magnitude(), schedule, where=KERNELS),
        jc.quantize(given["format"], where=KERNELS, scale_dtype="bfloat16", **group),
    )


def trained(given, data, epochs):
    """The function and its stored parameters."""
    fn, params = functools.partial(model, given["activation"]), init(given["width"])
    uses = jc.uses(fn, params, data[0][:2])
    steps = epochs * (len(data[1]) // BATCH)
    small, _ = train(
        cross_entropy(fn),
        params,
        *data,
        epochs,
        batch=BATCH,
        rate=given["rate"],
        compression=compression(given, steps),
        uses=uses,
        optimizer=OPTIMIZERS[given["optimizer"]],
    )
    return fn, small


def error(fn, small, part):
    """In percent."""
    return 100 - 100 * jc.evaluate(fn, small, batches(*part), ["accuracy"])["accuracy"]


def objective(trial, parts, epochs):
    """The error on the validation part, in percent, and the bytes of a trial."""
    optuna = require("optuna", extra="search")
    given = asked(trial)
    training, validation, test = parts
    fn, small = trained(given, training, max(1, epochs // 3))
    size, early = jc.nbytes(small), error(fn, small, validation)
    # Optuna's own pruners are for one objective.
    others = [
        t.user_attrs for t in trial.study.get_trials(deepcopy=False) if t.number < trial.number
    ]
    better = [o["early"] < early for o in others if o.get("size", size + 1) <= size]
    trial.set_user_attr("early", early)
    trial.set_user_attr("size", size)
    if len(better) >= 4 and np.mean(better) > 0.5:
        raise optuna.TrialPruned()
    fn, small = trained(given, training, epochs)
    trial.set_user_attr("test", error(fn, small, test))
    return error(fn, small, validation), jc.nbytes(small)


def study(journal, seed=None):
    """The study in a journal file, made if there is none."""
    optuna = require("optuna", extra="search")
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name=NAME,
        directions=["minimize", "minimize"],
        sampler=optuna.samplers.TPESampler(seed=seed),
        load_if_exists=True,
    )


def work(journal, trials, epochs, seed):
    """Takes trials until there are so many in the journal, those of all processes together."""
    optuna = require("optuna", extra="search")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    states = optuna.trial.TrialState
    ended = (states.COMPLETE, states.PRUNED)
    stop = optuna.study.MaxTrialsCallback(trials, states=ended)
    # A run that goes on must not draw again what an earlier one drew.
    before = len(study(journal).get_trials(deepcopy=False))
    own, parts = study(journal, 1000 * before + seed), load()
    if sum(t.state in ended for t in own.get_trials(deepcopy=False)) < trials:
        own.optimize(lambda trial: objective(trial, parts, epochs), callbacks=[stop])


def pareto(journal):
    """Rows of the trials that no other one beats in both, the smallest first."""
    best = sorted(study(journal).best_trials, key=lambda t: t.values[1])
    return [
        {"error": t.values[0], "test error": t.user_attrs["test"], "bytes": int(t.values[1])}
        | t.params
        for t in best
    ]


def main(argv=None):
    """Runs the workers, and prints what no trial beats."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--journal", type=Path, required=True, help="goes on if it is there")
    parser.add_argument("--trials", type=int, default=40, help="in all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    args = parser.parse_args(argv)
    if args.worker is not None:
        return work(args.journal, args.trials, args.epochs, args.worker)
    study(args.journal)
    common = ["--journal", args.journal, "--trials", args.trials, "--epochs", args.epochs]
    command = [sys.executable, "-m", "examples.search", *map(str, common), "--worker"]
    workers = [subprocess.Popen([*command, str(i)]) for i in range(args.workers)]
    if failed := [w.args for w in workers if w.wait()]:
        sys.exit(f"{failed[0]} failed; what is in {args.journal} stays, and the same call goes on")
    rows = pareto(args.journal)
    if args.json:
        print(json.dumps(rows))
        return rows
    for row in rows:
        shown = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print("  ".join(shown))
    return rows


if __name__ == "__main__":
    main()
