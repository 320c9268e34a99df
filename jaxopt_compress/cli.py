"""The commands of ``jaxopt-compress``; `jaxopt_compress.__main__` runs them."""

import json
import pathlib
import sys
import warnings
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.progress import track

from jaxopt_compress.compression import compress as compress_tree
from jaxopt_compress.lift.observe.uses import Use
from jaxopt_compress.planning import Report, Rule, assign, leaf_report, read_rules
from jaxopt_compress.planning.report import summarize
from jaxopt_compress.storage import Source, open_checkpoint, save
from jaxopt_compress.tree import AssumedLayout, assume_layout, map_named, named_leaves

app = tyro.extras.SubcommandApp()
_Json = Annotated[bool, tyro.conf.arg(name="json")]
_Checkpoint = Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
_Recipe = Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
_Out = Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]


@app.command
def compress(
    ckpt: _Checkpoint,
    recipe: _Recipe,
    out: _Out,
    /,
    layout: Literal["auto", "flax", "torch"] = "auto",
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False,
    as_json: tyro.conf.FlagCreatePairsOff[_Json] = False,
) -> None:
    """Compress the weights of a checkpoint, leaf by leaf.

    Args:
        ckpt: An orbax checkpoint, or a file or folder of safetensors.
        recipe: A TOML file with a list of [[rule]] tables, such as: where = "**/kernel",
            quantize = {format = "int8"}.
        out: The new checkpoint, for jaxopt_compress.load.
        layout: Whether kernels have their output axis last (flax) or first (torch); by default what
            the checkpoint says.
        overwrite: Replace OUT.
        as_json: Print the report as JSON.
    """
    rules = read_rules(recipe)
    source = open_checkpoint(ckpt)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: choose another path, or pass --overwrite")
    torch = source.output_first if layout == "auto" else layout == "torch"
    leaves = dict(named_leaves(source.tree))
    chosen = assign(rules, leaves)
    _check(chosen, leaves, torch)
    small, rows = _compress_leaves(source, list(leaves), chosen, torch)
    save(out, map_named(lambda path, _: small[path], source.tree), overwrite=overwrite)
    _show(summarize(rows), as_json)


@app.command
def inspect(
    ckpt: _Checkpoint,
    /,
    as_json: tyro.conf.FlagCreatePairsOff[_Json] = False,
) -> None:
    """Show what a checkpoint holds, without reading its arrays.

    Args:
        ckpt: An orbax checkpoint, or a file or folder of safetensors.
        as_json: Print JSON.
    """
    leaves = named_leaves(open_checkpoint(ckpt).tree)
    _show(summarize([leaf_report(p, None, x) for p, x in leaves if hasattr(x, "shape")]), as_json)


@app.command
def demo(out: pathlib.Path = pathlib.Path("jaxopt-compress-demo"), seed: int = 0) -> None:
    """Train a small network on digits, compress it in five ways, and compare.

    Args:
        out: Where plots, reports and checkpoints go.
        seed: Of everything random.
    """
    from jaxopt_compress.demo import run

    run(out, seed)


def _check(chosen: dict[str, Rule], leaves: dict[str, Any], torch: bool) -> None:
    """Raises what `init` would, from shapes alone and before anything is read."""
    seen: set[Any] = set()
    for path, rule in chosen.items():
        leaf = leaves[path]
        key = (id(rule.compression), tuple(leaf.shape), leaf.dtype, type(leaf))
        if rule.needs_values or key in seen:
            continue
        seen.add(key)
        init = lambda w, path=path, rule=rule: rule.compression.init(
            {path: w}, uses=_uses(path, w, torch)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AssumedLayout)
            jax.eval_shape(init, leaf)


def _compress_leaves(
    source: Source, paths: list[str], chosen: dict[str, Rule], torch: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The compressed leaves by path, and the rows of their report; one dense leaf at a time."""
    small: dict[str, Any] = {}
    rows, assumed = [], []
    console = Console(stderr=True)
    for path in track(paths, "compressing", console=console, transient=True):
        w = source.read(path)
        small[path] = w
        if path in chosen:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                uses = _uses(path, w, torch)
                tree = {path: jax.tree.map(jnp.asarray, w)}
                small[path] = compress_tree(tree, chosen[path].compression, uses=uses)[path]
            if any(issubclass(c.category, AssumedLayout) for c in caught):
                assumed.append(path)
        if hasattr(w, "shape"):
            rows.append(leaf_report(path, w, small[path]))
    if assumed:
        print(
            f"note: assumed the axes of {', '.join(assumed[:4])}{', ...' * (len(assumed) > 4)} "
            "(last axis: output; rank 4: convolution; other leading axes: stacked layers)",
            file=sys.stderr,
        )
    return small, rows


def _uses(path: str, w: Any, torch: bool) -> dict[str, list[Use]] | None:
    """What stands for the uses of a kernel whose output axis comes first."""
    if not torch or len(w.shape) < 2:
        return None
    # The axes of a Flax kernel of that rank, but the output axis before the contracting ones.
    layout = assume_layout(tuple(w.shape))
    depth = len(layout.contracting)
    use = Use(
        op="assumed",
        contracting=tuple(range(-depth, 0)),
        output=(-depth - 1,),
        stack=layout.stack,
        batch=(),
        gathered=(),
        flops=None,
        count=None,
        source="",
    )
    return {path: [use]}


def _show(found: Report, as_json: bool) -> None:
    print(json.dumps(found, indent=2) if as_json else found)
