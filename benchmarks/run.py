"""Runs the benchmarks, each in a process of its own, and compares them with the accepted results.

python benchmarks/run.py [--only trace_time prune_step] [--quick] [--seed 0] [--check] [--update]

Results are in `results/NAME.json`. `--update` accepts the new ones; `--check` ends with 1 if a
figure has drifted. A benchmark that fails ends the run with 1 in any case.
"""

import argparse
import datetime
import fnmatch
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any, NamedTuple

FOLDER = pathlib.Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
PACKAGES = ("jax", "jaxlib", "numpy", "optax", "flax", "jaxopt-compress")
# What each script takes for a quick run.
QUICK = {
    "trace_time": ["--rounds", "3"],
    "prune_step": ["--rounds", "2"],
    "qat_step": ["--rounds", "2", "--models", "mlp"],
    "ptq_inference": ["--rounds", "2", "--batch", "1", "--width", "512"],
    "compile_targets": ["--quick"],
}
# It compiles from shapes: nothing in it is random.
WITHOUT_SEED = ("compile_targets",)
# Settings, which are stored and not compared.
SETTINGS = ("rounds", "seed", "period", "blocks", "qwix", "not_installed/*")
# The relative change that is no drift, by the first pattern that a figure's name matches. None: the
# figure is shown and not compared, since it depends on the machine. Others: `DEFAULT`.
TOLERANCES = {
    "*flops_ratio": 0.0,
    "*bytes_ratio": 0.0,
    "rows/*_ratio": 0.0,
    "*ratio": 0.1,
    "*over_best": 0.1,
    "*over_qwix": 0.1,
    "*ms": None,
    "*compile_s": None,
    "*predicted_us": 0.1,
}
DEFAULT = 0.0


class Change(NamedTuple):
    """A figure beside its accepted value.

    Attributes:
        name: Of the figure.
        old: The accepted value, or None if there is none.
        new: The new one, or None if it was not measured.
        tolerance: The relative change that is no drift; None if it is not compared.
        drifted: Whether it is beyond.
    """

    name: str
    old: Any
    new: Any
    tolerance: float | None
    drifted: bool

    @property
    def ratio(self) -> float | None:
        """New over old, where both are numbers."""
        if not (_is_number(self.old) and _is_number(self.new)) or self.old == 0:
            return None
        return self.new / self.old


def flatten(figures: Any, name: str = "") -> dict[str, Any]:
    """Figures of nested tables by one name each; of an estimate its median.

    Example:
        >>> flatten({"ratio": [1.0, 0.9, 1.1], "rows": [{"target": "v5e", "bytes": 3}]})
        {'ratio': 1.0, 'rows/v5e/bytes': 3}
    """
    if isinstance(figures, dict):
        joined = lambda key: f"{name}/{key}" if name else str(key)
        return {
            k: x for key, value in figures.items() for k, x in flatten(value, joined(key)).items()
        }
    if isinstance(figures, list):
        if len(figures) == 3 and all(map(_is_number, figures)):
            return {name: figures[0]}
        if figures and all(isinstance(row, dict) for row in figures):
            return {k: x for row in figures for k, x in _flatten_row(row, name).items()}
        return {name: json.dumps(figures)}
    return {name: figures}


def _flatten_row(row: dict[str, Any], name: str) -> dict[str, Any]:
    """A row is named by its columns of words that name a case."""
    labels = [key for key in ("program", "target", "weights") if key in row]
    path = "/".join([name, *(str(row[key]) for key in labels)])
    return flatten({k: v for k, v in row.items() if k not in labels}, path)


def compare(old: dict[str, Any], new: dict[str, Any], quick: bool = False) -> list[Change]:
    """Figures beside the accepted ones, in the order of the new ones and then those that are gone.

    Args:
        old: Flat accepted figures.
        new: Flat new figures.
        quick: Timings of few rounds are not compared, and figures may be missing.
    """
    changes = []
    for name in [*new, *(k for k in old if k not in new)]:
        if _first(name, SETTINGS) is not None:
            continue
        tolerance = tolerance_of(name)
        if quick and tolerance:
            tolerance = None
        before, after = old.get(name), new.get(name)
        if name not in old:
            drifted = False
        elif name not in new:
            drifted = not quick
        else:
            drifted = tolerance is not None and _differs(before, after, tolerance)
        changes.append(Change(name, before, after, tolerance, drifted))
    return changes


def tolerance_of(name: str) -> float | None:
    """The relative change of a figure that is no drift."""
    pattern = _first(name, TOLERANCES)
    return DEFAULT if pattern is None else TOLERANCES[pattern]


def _first(name: str, patterns: Any) -> str | None:
    return next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)


def _differs(old: Any, new: Any, tolerance: float) -> bool:
    if _is_number(old) and _is_number(new):
        # Rounding of the ratio itself is no drift. NaN is unequal to everything.
        return not abs(new - old) <= tolerance * abs(old) * (1 + 1e-9)
    return old != new


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def table(changes: list[Change]) -> str:
    """Changes as aligned text."""
    show = lambda x: "-" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)[:40]
    lines = [("figure", "old", "new", "ratio", "")]
    for c in changes:
        lines.append((c.name, show(c.old), show(c.new), show(c.ratio), "DRIFTED" * c.drifted))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        [
            cell.rjust(w) if 0 < i < 4 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def run(name: str, seed: int, quick: bool) -> tuple[dict[str, Any] | None, int]:
    """The record of a run, None if it printed no figures, and its exit code."""
    options = [] if name in WITHOUT_SEED else ["--seed", str(seed)]
    options += QUICK[name] if quick else []
    script = FOLDER / f"{name}.py"
    before = machine()
    begin = datetime.datetime.now(datetime.UTC)
    done = subprocess.run([sys.executable, script, "--json", *options], stdout=subprocess.PIPE)
    try:
        figures = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return None, done.returncode or 1
    record = {
        "benchmark": name,
        "date": begin.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": " ".join(["python", f"benchmarks/{name}.py", "--json", *options]),
        "seed": None if name in WITHOUT_SEED else seed,
        "versions": versions(),
        "machine": before,
        "figures": figures,
    }
    return record, done.returncode


def machine() -> dict[str, Any]:
    """The processor, and whether other work was running before."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0]
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {"cpu": model, "cores": cores, "load": round(load, 2), "busy": load > cores / 2}


def versions() -> dict[str, str | None]:
    """Of Python and packages, and the commit of a checkout, marked if it has changes."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
        found["commit"] = done.stdout.strip() or None
    except OSError:
        found["commit"] = None
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=QUICK, default=list(QUICK), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="few rounds; timings not compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="end with 1 if something drifted")
    parser.add_argument("--update", action="store_true", help="accept the new results")
    args = parser.parse_args(argv)
    if args.quick and args.update:
        parser.error("--update accepts results of whole runs only: leave out --quick")
    drifted, failed = [], []
    for name in args.only:
        print(f"\n{name}", flush=True)
        record, code = run(name, args.seed, args.quick)
        if code or record is None:
            failed.append(name)
        if record is None:
            continue
        path = RESULTS / f"{name}.json"
        old = json.loads(path.read_text()) if path.exists() else None
        if old and old["machine"]["cpu"] != record["machine"]["cpu"]:
            print(f"the accepted results are of another machine: {old['machine']['cpu']}")
        if record["machine"]["busy"]:
            print("this machine is busy: timings may be off")
        accepted = flatten(old["figures"]) if old else {}
        changes = compare(accepted, flatten(record["figures"]), args.quick)
        print(table(changes))
        drifted += [f"{name}: {c.name}" for c in changes if c.drifted]
        if args.update and not code:
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
    print()
    for figure in drifted:
        print(f"drifted: {figure}")
    for name in failed:
        print(f"failed: {name}")
    if not (drifted or failed):
        print("nothing drifted")
    return int(bool(failed or (args.check and drifted)))


if __name__ == "__main__":
    sys.exit(main())
