"""The commands of ``jaxopt-compress``; `jaxopt_compress.__main__` runs them."""

import contextlib
import importlib
import json
import pathlib
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.progress import track

from jaxopt_compress.compression import NeedsStats, NeedsValues, as_compression
from jaxopt_compress.compression import compress as compress_tree
from jaxopt_compress.lift import uses_by_layout
from jaxopt_compress.planning import Report, Rule, assign, leaf_report, read_rules
from jaxopt_compress.planning.report import summarize
from jaxopt_compress.search import auto as find_smallest
from jaxopt_compress.storage import Source, check_free, open_checkpoint, save
from jaxopt_compress.storage.coding import check_coding
from jaxopt_compress.storage.partial import Partial, describe_files
from jaxopt_compress.tree import (
    Part,
    map_named,
    named_leaves,
    warn_of_vectors,
)

app = tyro.extras.SubcommandApp()
_Json = Annotated[bool, tyro.conf.arg(name="json")]
_Checkpoint = Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
_Recipe = Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
_named = lambda metavar: tyro.conf.arg(metavar=metavar, help_behavior_hint="")
_Layout = Annotated[Literal["in,out", "out,in"] | None, _named("in,out|out,in")]
_Coding = Annotated[
    Literal["ans", "huffman", "zstd", "context"] | None, _named("ans|huffman|zstd|context")
]
_Out = Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]


@app.command
def compress(
    ckpt: _Checkpoint,
    recipe: _Recipe,
    out: _Out,
    /,
    layout: _Layout = None,
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False,
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False,
    coding: _Coding = None,
    resume: tyro.conf.FlagCreatePairsOff[bool] = False,
    as_json: tyro.conf.FlagCreatePairsOff[_Json] = False,
) -> None:
    """Compress the weights of a checkpoint, leaf by leaf.

    Args:
        ckpt: An orbax checkpoint; or safetensors: a file, a folder of files or an index.json.
        recipe: A TOML file with a list of [[rule]] tables, such as: where = "**/kernel",
            quantize = {format = "int8"}.
        out: The new checkpoint, for jaxopt_compress.load.
        layout: Which axis of a matrix the model sums over: "in,out" the first, as Flax writes
            kernels; "out,in" the last, as PyTorch writes weights. Kernels of convolutions follow.
            By default "out,in" for safetensors that PyTorch wrote, otherwise "in,out".
        dry_run: Compress and report, but write nothing.
        overwrite: Replace OUT, if it is a checkpoint of this command.
        coding: Code the arrays without loss, as jaxopt_compress.save does: ans is fast, context
            the smallest.
        resume: Keep each finished leaf in OUT.partial until all are done, and go on from those that
            an earlier run has left there.
        as_json: Print the report as JSON.
    """
    rules = read_rules(recipe)
    source = open_checkpoint(ckpt)
    _check_output(out, ckpt, overwrite)
    output_first = source.output_first if layout is None else layout == "out,in"
    leaves = dict(named_leaves(source.tree))
    chosen = assign(rules, leaves)
    _check(chosen, leaves, output_first)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rule in rules:
            warn_of_vectors(leaves, rule.where)
    for warning in caught:
        _note(str(warning.message))
    if coding is not None:
        check_coding(coding)
    partial = None
    if resume and not dry_run:
        job = {"recipe": recipe.read_text(), "output_first": output_first, "version": 1}
        job["input"] = describe_files(ckpt.expanduser().resolve())
        partial = Partial(out.with_name(f"{out.name}.partial"), job)
    small, rows = _compress_leaves(
        source, list(leaves), chosen, output_first, keep=not dry_run, partial=partial
    )
    if not dry_run:
        tree = map_named(lambda path, _: small[path], source.tree)
        save(out, tree, overwrite=overwrite, coding=coding)
    if partial is not None:
        partial.remove()
    found = summarize(rows)
    _show(found, as_json)
    if any("layout" in row for row in rows) and layout is None:
        _note(
            f"kernels of rank 2 are taken for {_name_of(output_first)}, as "
            f"{'PyTorch writes them' if output_first else 'Flax writes them'}; pass --layout "
            f"{'in,out' if output_first else 'out,in'} if they are the other way round"
        )
    if dry_run:
        before, after = (found["total"][k] for k in ("dense_bytes", "stored_bytes"))
        _note(f"{after:,} bytes in the place of {before:,} dense ones; nothing was written")


@app.command
def inspect(
    ckpt: _Checkpoint,
    /,
    as_json: tyro.conf.FlagCreatePairsOff[_Json] = False,
) -> None:
    """Show what a checkpoint holds, without reading its arrays.

    Args:
        ckpt: An orbax checkpoint; or safetensors: a file, a folder of files or an index.json.
        as_json: Print JSON.
    """
    leaves = named_leaves(open_checkpoint(ckpt).tree)
    _show(summarize([leaf_report(p, None, x) for p, x in leaves if hasattr(x, "shape")]), as_json)


@app.command
def auto(
    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODULE:FUNCTION")],
    out: _Out,
    /,
    recipe: pathlib.Path | None = None,
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Find the smallest parameters whose quality stays within bounds.

    Args:
        task: A Python function without arguments that returns those of jaxopt_compress.auto, a
            dict: fn, params, batches, loss, within, held_out and what else it takes.
        out: The new checkpoint, for jaxopt_compress.load.
        recipe: Where to write the recipe, for the command compress.
        overwrite: Replace OUT, if it is a checkpoint of this command.
    """
    check_free(out.expanduser().resolve(), overwrite)
    found = find_smallest(**_function(task)())
    print(found)
    if not found.met:
        raise ValueError("no recipe kept the bounds; nothing was written")
    save(out, found.params, overwrite=overwrite)
    if recipe is not None:
        recipe.write_text(found.toml())


def _function(name: str) -> Any:
    """What ``module:function`` names, with modules of the working folder."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"{name!r} names no function: it is module:function, such as mine:task")
    sys.path.insert(0, str(pathlib.Path.cwd()))
    return getattr(importlib.import_module(module), attribute)


@app.command
def demo(out: pathlib.Path = pathlib.Path("jaxopt-compress-demo"), seed: int = 0) -> None:
    """Train a small network on digits, compress it in five ways, and compare.

    Args:
        out: Where plots, reports and checkpoints go.
        seed: The seed of everything random.
    """
    from jaxopt_compress.demo import run

    run(out, seed)


def _check_output(out: pathlib.Path, ckpt: pathlib.Path, overwrite: bool) -> None:
    """Refuses to write where something would be lost."""
    target, read = out.expanduser().resolve(), ckpt.expanduser().resolve()
    if target == read or target in read.parents or read in target.parents:
        raise FileExistsError(
            f"{out} is, holds or lies in what is read, {ckpt}: choose another path"
        )
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{out} exists: choose another path, or pass --overwrite")
    check_free(target, overwrite=True)


def _check(chosen: dict[str, Rule], leaves: dict[str, Any], output_first: bool) -> None:
    """Raises what `init` would, from shapes alone and before anything is read."""
    seen: set[Any] = set()
    for path, rule in chosen.items():
        if rule.begin:
            raise ValueError(
                f"{rule.name} begins at update {rule.begin}, and a checkpoint is compressed before "
                "the first update: leave begin out here, or train with it in Python"
            )
        leaf = leaves[path]
        key = (rule.name, tuple(leaf.shape), leaf.dtype, type(leaf))
        if key in seen:
            continue
        seen.add(key)
        with _in_rule(rule):
            init = as_compression({rule.where: rule.compression}).init
            uses = uses_by_layout({path: leaf}, _order(output_first)) or None
            with contextlib.suppress(NeedsValues):
                jax.eval_shape(lambda w: init(Part({path: w}), uses=uses), leaf)  # noqa: B023


@contextlib.contextmanager
def _in_rule(rule: Rule) -> Iterator[None]:
    """Names the rule in what its compression raises."""
    try:
        yield
    except NeedsStats as error:
        raise ValueError(
            f"{rule.name}: the command runs no model, so that it has no activations to calibrate "
            "with; in Python: compress(params, read_recipe(path), stats=calibrate(fn, params, "
            "batches)), each of jaxopt_compress"
        ) from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{rule.name}: {error}") from error


def _compress_leaves(
    source: Source,
    paths: list[str],
    chosen: dict[str, Rule],
    output_first: bool,
    keep: bool,
    partial: Partial | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The compressed leaves by path, and the rows of their report; one dense leaf at a time."""
    kept: dict[str, Any] = {}
    rows, assumed = [], []
    console = Console(stderr=True)
    for path in track(paths, "compressing", console=console, transient=True):
        rule = chosen.get(path)
        finished = partial.get(path) if partial is not None and rule is not None else None
        if finished is not None:
            kept[path] = finished[0]
            rows.append(finished[1])
            continue
        w = small = source.read(path)
        if rule is not None:
            with warnings.catch_warnings(record=True) as caught, _in_rule(rule):
                warnings.simplefilter("always")
                tree = Part({path: jax.tree.map(jnp.asarray, w)})
                uses = uses_by_layout({path: w}, _order(output_first)) or None
                small = compress_tree(tree, {rule.where: rule.compression}, uses=uses)[path]
            for warning in caught:
                _note(str(warning.message))
            if len(w.shape) > 2:
                assumed.append(path)
        if keep:
            kept[path] = small
        if hasattr(w, "shape"):
            rows.append(leaf_report(path, w, small))
            if rule is not None and len(w.shape) == 2:
                rows[-1]["layout"] = _name_of(output_first)
            if partial is not None and rule is not None:
                partial.put(path, small, rows[-1])
    if assumed:
        _note(
            f"assumed the axes of {', '.join(assumed[:4])}{', ...' * (len(assumed) > 4)} "
            f"(kernels {_name_of(output_first)}; rank 4: convolution; other leading axes: stacked "
            "layers)"
        )
    return kept, rows


def _order(output_first: bool) -> str:
    return "out,in" if output_first else "in,out"


def _name_of(output_first: bool) -> str:
    return "[out, in]" if output_first else "[in, out]"


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _show(found: Report, as_json: bool) -> None:
    print(json.dumps(found, indent=2) if as_json else found)
