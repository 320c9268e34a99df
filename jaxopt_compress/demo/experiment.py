"""The main job: train, compress in five ways, measure, store, reload."""

import contextlib
import functools
import importlib.metadata
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jaxopt_compress as jc
from jaxopt_compress.demo import data, evaluation, plots
from jaxopt_compress.demo.methods import METHODS, Method, at_once, gradual
from jaxopt_compress.demo.table import Row, table
from jaxopt_compress.demo.training import BATCH, CNN, DEFAULT, Epochs, Trained, steps_of, train
from jaxopt_compress.extras import require
from jaxopt_compress.typing import PyTree

LONGER = "dense, longer"
VERSIONS = ("jaxopt-compress", "jax", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn")


class Variant(NamedTuple):
    """A trained network in its stored form.

    Attributes:
        key: In file names.
        name: In the table.
        small: The tree of parameters.
        row: What was measured.
        report: `jaxopt_compress.report` against the dense network.
        trained: The training that led to it.
    """

    key: str
    name: str
    small: PyTree
    row: Row
    report: dict[str, Any]
    trained: Trained


def run(
    out: Path, seed: int = 0, epochs: Epochs = DEFAULT, methods: Sequence[Method] = METHODS
) -> None:
    """Trains a network on digits, compresses it in several ways, and compares.

    Prints a table, and writes ``report.json``, ``sparsity.png``, ``accuracy.png``,
    ``layer_error.png`` and ``checkpoints/`` into ``out``. The same seed gives the same table, but
    for times; the sizes of files, of which some kilobytes differ, are in the report.

    Args:
        out: A folder; files of an earlier run in it are replaced.
        seed: The seed of the initial parameters and the order of the images.
        epochs: How long to train.
        methods: The ways to compress.

    Raises:
        ModuleNotFoundError: rich, scikit-learn or matplotlib is missing.
        RuntimeError: A reloaded checkpoint gives other logits.
    """
    # Before any computation.
    for package in ("matplotlib", "sklearn"):
        require(package, extra="examples")
    console = require("rich.console", extra="examples").Console()
    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    train_set, test_set = data.load()
    logits = jax.jit(jc.lift(CNN().apply, on_fallback="error"))  # pyright: ignore
    variants = _variants(out, seed, epochs, methods, (train_set, test_set), logits, console)

    times = evaluation.milliseconds(logits, {v.name: v.small for v in variants}, test_set.images)
    last = variants[-1]
    folder = out / "checkpoints" / last.key
    expected = logits(last.small, test_set.images)
    equal = evaluation.same_bits(expected, logits(jc.load(folder), test_set.images))

    rows = [v.row for v in variants]
    compressed = variants[2:]
    plots.sparsity(out / "sparsity.png", {v.name: v.trained for v in compressed})
    plots.accuracy(out / "accuracy.png", rows, len(test_set.labels))
    plots.layer_error(out / "layer_error.png", {v.name: v.report for v in compressed})
    device = jax.devices()[0].device_kind
    document = {
        "seed": seed,
        "versions": _versions(),
        "data": {
            "name": "scikit-learn digits",
            "train": len(train_set.labels),
            "test": len(test_set.labels),
        },
        "training": {"batch": BATCH, **{f"{k}_epochs": n for k, n in epochs._asdict().items()}},
        "table": [row._asdict() for row in rows],
        "reports": {v.name: v.report for v in variants},
        "reload": {"checkpoint": last.key, "logits": int(np.size(expected)), "equal": equal},
        # The two that differ between runs: storage commits its files concurrently.
        "file_bytes": {
            v.name: evaluation.file_bytes(out / "checkpoints" / v.key) for v in variants
        },
        "timing": {
            "device": device,
            "batch": len(test_set.labels),
            "median_ms_per_batch": times,
            "total_seconds": (seconds := time.perf_counter() - begin),
        },
    }
    (out / "report.json").write_text(json.dumps(document, indent=1) + "\n")

    console.print(table(rows, times, device, len(test_set.labels)))
    if not equal:
        raise RuntimeError(f"{folder} gives other logits when loaded again")
    console.print(
        f"{folder} loaded again: all {np.size(expected):,} logits are equal, bit for bit.\n"
        f"Plots, report.json and checkpoints are in {out}; {seconds:.0f} s in all.",
        highlight=False,
        soft_wrap=True,
    )


def _variants(out, seed, epochs, methods, sets, logits, console) -> list[Variant]:
    """The dense network, trained on as long as the others too, and what each method makes of it."""
    train_set, test_set = sets
    model = CNN()
    tuned = [LONGER, *(method.name for method in methods)]
    names = {"dense": epochs.dense, **dict.fromkeys(tuned, epochs.compressed)}
    with _bars(console, names) as (start, advance):

        def fit(name: str, *args: PyTree) -> Trained:
            start(name)
            return train(model, *args, on_epoch=lambda: advance(name))

        init_key, dense_key, tuning_key = jax.random.split(jax.random.key(seed), 3)
        params = model.init(init_key, train_set.images[:1])
        schedule = optax.cosine_decay_schedule(2e-3, steps_of(train_set, epochs.dense))
        tx = optax.adamw(schedule, weight_decay=1e-3)
        trained = fit("dense", params, tx, train_set, dense_key, epochs.dense)
        params = trained.params
        measure = functools.partial(_measure, out / "checkpoints", params, test_set, logits)

        variants = [measure("dense", "dense", params, params, trained)]
        uses = jc.uses(model.apply, params, train_set.images[:1])
        steps = steps_of(train_set, epochs.compressed)
        adam = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
        # All see the same batches.
        trained = fit(LONGER, params, adam, train_set, tuning_key, epochs.compressed)
        variants.append(measure("dense_longer", LONGER, trained.params, params, trained))
        for method in methods:
            c = method.make(gradual(steps))
            tx = jc.compressed_training(adam, c, uses=uses)
            trained = fit(method.name, params, tx, train_set, tuning_key, epochs.compressed, c)
            small = jc.compress(trained.params, c, state=trained.opt_state)
            once = jc.compress(params, method.make(at_once()), uses=uses)
            variants.append(measure(method.key, method.name, small, once, trained))
    return variants


@contextlib.contextmanager
def _bars(console, epochs: dict[str, int]):
    """A bar of progress for each training; gives what starts one, and what advances it."""
    bar = require("rich.progress", extra="examples")
    columns = (bar.TextColumn("{task.description}"), bar.BarColumn(), bar.MofNCompleteColumn())
    columns += (bar.TextColumn("epochs"), bar.TimeElapsedColumn())
    with bar.Progress(*columns, console=console) as progress:
        add = functools.partial(progress.add_task, start=False)
        bars = {name: add(name, total=total) for name, total in epochs.items()}
        yield (
            (lambda name: progress.start_task(bars[name])),
            (lambda name: progress.advance(bars[name])),
        )


def _measure(checkpoints, params, test_set, logits, key, name, small, once, trained) -> Variant:
    """Stores `small`, and measures it beside `once`, the same method without training."""
    jc.save(checkpoints / key, small, overwrite=True)
    report = jc.report(params, small)
    dense_logits = logits(params, test_set.images)
    quality = lambda tree: evaluation.quality(logits(tree, test_set.images), dense_logits, test_set)
    row = Row(
        variant=name,
        **quality(small),
        one_shot_accuracy=quality(jc.materialize(once))["accuracy"],
        stored_bytes=jc.nbytes(small),
        ratio=jc.nbytes(params) / jc.nbytes(small),
        bits_per_weight=report["total"]["bits_per_weight"],
    )
    return Variant(key, name, small, row, report, trained)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # Run from a checkout that is not installed.
            found[name] = None
    return found
