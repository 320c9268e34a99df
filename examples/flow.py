"""What the examples of a whole flow share: variants trained on, stored, reopened, compared, drawn.

`examples.movielens`, `examples.text_flow` and `examples.image_flow` bring a model, data and
variants, ``{name: steps -> compression}``; a new method is one more line there.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxopt_compress as jc
from examples.deploy import elsewhere, size_of
from jaxopt_compress.evaluation.compare import Comparison
from jaxopt_compress.extras import require

# From the steps of training, which schedules need, to a compression; 0 steps: all of it at once.
Variants = Mapping[str, Callable[[int], jc.Compression]]


class Task(NamedTuple):
    """A trained model, and how it is judged.

    Attributes:
        fn: ``fn(params, *inputs)``.
        params: Trained, in float32.
        test: Held-out batches, as `jaxopt_compress.evaluate` takes them.
        metrics: Likewise.
        tune: ``tune(compression, uses) -> tree``: trains on through the view of a compression, and
            returns the stored form.
        steps: Of ``tune``.
        more: ``more(params) -> {figure: value}``, by another function than ``fn``.
    """

    fn: Callable[..., Any]
    params: Any
    test: Sequence[Any]
    metrics: Sequence[Any]
    tune: Callable[[jc.Compression | None, Any], Any]
    steps: int
    more: Callable[[Any], dict[str, float]] = lambda params: {}


def sparse(share: float, steps: int, where: Any, **given: Any) -> jc.Compression:
    """Magnitude pruning whose share rises over the first half of the steps."""
    schedule = jc.schedules.constant(share)
    if steps:
        end = max(1, steps // 2)
        schedule = jc.schedules.polynomial(share, begin=0, end=end, every=max(1, steps // 50))
    return jc.prune(jc.scores.magnitude(), schedule, where=where, **given)


def inputs_of(batch: Any) -> tuple[Any, ...]:
    """What the function takes besides parameters."""
    return batch[0] if isinstance(batch[0], tuple) else (batch[0],)


def variants_of(task: Task, made: Variants) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Each variant trained on, and float32 trained on as long, which is fair to compare with.

    Returns:
        Name -> tree, and name -> ``untrained``, the first metric straight after compression, and
        ``seconds``, the time that training took.
    """
    uses = jc.uses(task.fn, task.params, *inputs_of(task.test[0]))
    notes: dict[str, dict[str, float]] = {"float32, on": {}}
    # All of them before any training, so that what cannot work says so at once.
    for name, make in made.items():
        plain = jc.compress(task.params, make(0), uses=uses)
        found = jc.evaluate(task.fn, plain, task.test, task.metrics[:1])
        notes[name] = {"untrained": next(iter(found.values()))}
    trees: dict[str, Any] = {"float32": task.params}
    for name, note in notes.items():
        begin = time.perf_counter()
        trees[name] = task.tune(made[name](task.steps) if name in made else None, uses)
        jax.block_until_ready(jax.tree.leaves(trees[name]))
        note["seconds"] = round(time.perf_counter() - begin, 1)
    return trees, notes


def store(folder: Path, trees: Mapping[str, Any]) -> dict[str, Path]:
    """Writes a checkpoint of each tree, which this package loads."""
    paths = paths_of(folder, trees)
    for name, path in paths.items():
        jc.save(path, trees[name], overwrite=True)
    return paths


def paths_of(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Name -> a path in a folder."""
    return {name: folder / name.replace(" ", "_").replace("%", "") for name in names}


def reopened(module: str, checkpoint: Path, *arguments: str) -> dict[str, float]:
    """The metrics of a checkpoint in a fresh process: ``python -m module --checkpoint``."""
    command = [sys.executable, "-m", module, "--checkpoint", str(checkpoint), "--json", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def deployed(folder: Path, task: Task, trees: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Exports the function with each tree, for processes that have jax and numpy alone.

    Returns:
        Name -> ``deployed``, the first metric of such a process's answers, and ``artifact_kB``.
    """
    columns = [np.concatenate(x) for x in zip(*map(inputs_of, task.test), strict=True)]
    any_number = jax.export.symbolic_args_specs(tuple(columns), "n, ...")
    ends = np.cumsum([len(inputs_of(batch)[0]) for batch in task.test])[:-1]
    found = {}
    for name, path in paths_of(folder, trees).items():
        shutil.rmtree(path, ignore_errors=True)
        jc.export(path, task.fn, trees[name], *any_number)
        with tempfile.TemporaryDirectory() as place:
            answers = elsewhere("artifact", path.absolute(), Path(place), *columns)
        parts = zip(np.split(answers, ends), task.test, strict=True)
        batches = [(y, *batch[1:]) for y, batch in parts]
        figures = jc.evaluate(lambda params, y: y, {}, batches, task.metrics[:1])
        found[name] = {"deployed": next(iter(figures.values())), "artifact_kB": size_of(path) / 1e3}
    return found


def plot(rows: Mapping[str, Mapping[str, Any]], metric: str, path: Path, title: str) -> None:
    """A metric against stored bytes, one point per variant; hollow ones are without training."""
    # Without pyplot there is no display and no global state.
    figure = require("matplotlib.figure", extra="examples").Figure(
        figsize=(8, 5), dpi=140, layout="constrained"
    )
    axes = figure.subplots()
    for name, row in rows.items():
        x = row["stored_bytes"] / 1e3
        (mark,) = axes.plot(x, row[metric], "o", label=f"{name}: {x:,.0f} kB, {row[metric]:.4f}")
        if "untrained" in row:
            ends = [row["untrained"], row[metric]]
            axes.plot([x, x], ends, color=mark.get_color(), linewidth=1, alpha=0.5)
            axes.plot(x, ends[0], "o", color=mark.get_color(), markerfacecolor="white")
    axes.set(xscale="log", xlabel="stored size (kB)", ylabel=metric)
    axes.set_title(title, loc="left")
    axes.legend(frameon=False, fontsize="x-small")
    figure.savefig(path)


def arguments(doc: str, epochs: int, tune: int) -> argparse.ArgumentParser:
    """What each of these commands takes."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=epochs, help="of float32")
    parser.add_argument("--tune", type=int, default=tune, help="more epochs, of each variant")
    parser.add_argument("--variants", nargs="*", help="only these, by name")
    parser.add_argument("--store", type=Path, help="write a checkpoint of each here, and reopen it")
    parser.add_argument("--checkpoint", type=Path, help="measure this one, and do nothing else")
    parser.add_argument("--artifacts", type=Path, help="export each to here, and run it elsewhere")
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 for none")
    parser.add_argument("--plot", type=Path, help="write quality against bytes to this PNG")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    parser.add_argument("--log", type=Path, help="append figures of each epoch's weights, as JSON")
    parser.add_argument("--html", type=Path, help="write a report to this page")
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    return parser


def of_training(args: argparse.Namespace) -> dict[str, Any]:
    """What `examples.models.training.train` is told."""
    return {"log": args.log, "accumulate": args.accumulate}


def chosen(parser: argparse.ArgumentParser, made: Variants, names: Sequence[str] | None) -> Any:
    """The variants asked for, by default all."""
    if unknown := [name for name in names or () if name not in made]:
        parser.error(f"there is no variant {unknown[0]!r}; there are {', '.join(made)}")
    return {name: make for name, make in made.items() if names is None or name in names}


def finish(
    module: str, title: str, task: Task, made: Variants, args: argparse.Namespace, *same: str
) -> dict[str, dict[str, Any]]:
    """Trains the variants, stores, compares, draws and prints them.

    Args:
        module: The command itself, which measures checkpoints in a fresh process.
        title: Of the plot.
        task: What was trained.
        made: The variants.
        args: What `arguments` read.
        same: Further flags for the fresh process.

    Returns:
        Name -> figures of `jaxopt_compress.compare`, with those of `variants_of` and `deployed`,
        and ``reopened``, the first metric of the checkpoint in a fresh process.
    """
    trees, notes = variants_of(task, made)
    seen = map(inputs_of, task.test[:1])
    stats = jc.calibrate(task.fn, task.params, seen) if args.html else None
    rows = jc.compare(task.fn, trees, task.test, task.metrics, rounds=args.rounds, stats=stats)
    metric = next(iter(next(iter(rows.values()))))
    if args.html:
        reports = {name: jc.report(task.params, trees[name], histograms=40) for name in made}
        rows.html(args.html, title=title, reports=reports)
    for name, row in rows.items():
        row |= task.more(trees[name]) | notes.get(name, {})
    if args.store:
        for name, path in store(args.store, trees).items():
            rows[name]["reopened"] = reopened(module, path, *same)[metric]
    if args.artifacts:
        for name, found in deployed(args.artifacts, task, trees).items():
            rows[name] |= found
    if args.plot:
        plot(rows, metric, args.plot, title)
    if args.json:
        print(json.dumps(rows))
    else:
        print(f"{title}\n{table(rows)}")
    return rows


def table(rows: Mapping[str, Mapping[str, Any]]) -> Comparison:
    """Without what is of no interest here."""
    hidden = {"resident_bytes", "agreement", "difference", "flops", "layers"}
    return Comparison(
        {v: {k: x for k, x in row.items() if k not in hidden} for v, row in rows.items()}
    )
