"""What a compression will do to each parameter, found from shapes before anything is computed."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxopt_compress.arrays.base import stored_bytes
from jaxopt_compress.compression import Compression, Recipe, as_compression
from jaxopt_compress.lift import Statistics, Use, lift, uses
from jaxopt_compress.planning.chips import Chip, chip_of
from jaxopt_compress.planning.costs import array_bytes, product_flops, read_bytes, runs_in_integers
from jaxopt_compress.planning.forms import Form, Forms
from jaxopt_compress.planning.html import (
    Section,
    as_html,
    leaf_sections,
    recipe_section,
    write_page,
)
from jaxopt_compress.planning.tables import Table, as_rich, as_text
from jaxopt_compress.tree import fit_of, named_leaves
from jaxopt_compress.tree.paths import is_float
from jaxopt_compress.typing import Leaf, PyTree


class Plan(dict[str, Any]):
    """A table of leaves that is also a plain dict: ``{"leaves": [...], "total": {...}}``.

    A row has ``path``, ``shape``, ``dtype``; ``rule``, the pattern of the recipe that took it;
    ``method``, and ``call``, what was asked for; ``skipped``, why it stays as it is;
    ``dense_bytes``, ``stored_bytes``, ``ratio``, ``bits_per_weight``; ``flops`` of its products in
    a call; ``moved_bytes``, what a call reads of it at least. ``estimated`` is true where the
    stored size depends on values, and was scaled up from a small random matrix. With a chip there
    are ``microseconds``, the roofline ``max(bytes / bandwidth, operations / peak)``, and ``bound``,
    which of the two it is. Unknown values are None.

    The total has sums, ``peak_bytes``, what compressing needs at most (all parameters before and
    after, and what one leaf needs on the way, without fusion), ``moved_bytes`` with arguments and
    results, and with a chip ``dense_microseconds``, the same before compression.
    """

    def __str__(self) -> str:
        return as_text(self.table())

    def __rich__(self) -> Any:
        return as_rich(self.table())

    def html(self, path: str | os.PathLike[str], *, title: str = "Compression plan") -> None:
        """Writes one HTML file that needs no network: the table, charts by leaf, and the rules.

        Args:
            path: The file.
            title: The title of the page.

        Raises:
            ModuleNotFoundError: vl-convert is missing.
        """
        calls = {f"{row['rule'] or '**'}: {row['call']}" for row in self["leaves"] if row["call"]}
        sections = [
            Section("What will be done", [as_html(self.table())]),
            *leaf_sections(self["leaves"]),
            recipe_section("\n".join(sorted(calls))),
        ]
        write_page(path, title, sections)

    def table(self) -> Table:
        """What is printed."""
        columns = [c for c in _COLUMNS if any(row.get(c) is not None for row in self["leaves"])]
        text = lambda row, c: "" if row.get(c) is None else _COLUMNS[c][1](row[c])
        rough = lambda row, c: row.get("estimated") and c in _ESTIMATED and row.get(c) is not None
        cells = lambda row: ["~" * bool(rough(row, c)) + text(row, c) for c in columns]
        total = cells({**self["total"], "path": "total"})
        titles = [_COLUMNS[c][0] for c in columns]
        rows = [cells(row) for row in self["leaves"]]
        return Table(titles, rows, total, [c not in _LEFT for c in columns])


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "path": ("leaf", str),
    "shape": ("shape", lambda v: "x".join(map(str, v)) or "scalar"),
    "rule": ("rule", str),
    "method": ("method", str),
    "skipped": ("stays, since", str),
    "bits_per_weight": ("bits/weight", "{:.3g}".format),
    "dense_bytes": ("dense bytes", "{:,}".format),
    "stored_bytes": ("bytes", "{:,}".format),
    "ratio": ("ratio", "{:.2f}".format),
    "flops": ("FLOPs", "{:.3g}".format),
    "moved_bytes": ("moved", "{:,}".format),
    "microseconds": ("us", "{:.3g}".format),
    "bound": ("bound by", str),
}
_LEFT = ("path", "shape", "rule", "method", "skipped", "bound")
_ESTIMATED = ("method", "bits_per_weight", "stored_bytes", "ratio", "moved_bytes", "microseconds")


def plan(
    fn: Callable[..., PyTree],
    params: PyTree,
    recipe: Compression | Recipe,
    *args: PyTree,
    stats: Mapping[str, Sequence[Statistics]] | None = None,
    chip: str | Chip | None = None,
) -> Plan:
    """Says what `compress` will do, and what a call will cost, from shapes alone.

    Refuses what would fail later: a pattern that matches nothing, a group that does not divide,
    missing statistics, an order that loses what came before, a function that does not take these
    arguments.

    Args:
        fn: Called as ``fn(params, *args)``.
        params: A pytree of arrays or `jax.ShapeDtypeStruct`.
        recipe: As `compress` takes it.
        *args: The other arguments of a call, arrays or `jax.ShapeDtypeStruct`.
        stats: What `calibrate` found, for methods that need it.
        chip: A name, such as ``"tpu v5e"``, or a `jaxopt_compress.planning.Chip`: adds the time
            that memory and arithmetic allow at best. One of ``tpu v4``, ``tpu v5e``, ``tpu v5p``,
            ``tpu v6e``, ``a100``, ``h100``, ``h200``.

    Returns:
        The `Plan`. Bytes moved count parameters in their stored form, once, with arguments and
        results of the call; activations in between are not counted, nor tables that are only looked
        up.

    Raises:
        TypeError: As `compress`.
        ValueError: As `compress`, or an unknown chip.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> shape = lambda *n: jax.ShapeDtypeStruct(n, jnp.bfloat16)
        >>> params = {"up": shape(4096, 14336), "norm": shape(4096)}
        >>> fn = lambda p, x: (x * p["norm"]) @ p["up"]
        >>> recipe = {"up": jc.quantize("int4", group_size=128)}
        >>> print(jc.plan(fn, params, recipe, shape(1, 4096), chip="tpu v5e"))
        leaf   shape       rule  method    stays, since ...

    References:
        Williams et al., 2009, Roofline: An Insightful Visual Performance Model.
    """
    on = None if chip is None else chip_of(chip)
    compression, shapes = as_compression(recipe), jax.tree.map(_abstract, params)
    found, outputs = uses(fn, shapes, *args), _outputs(fn, shapes, args)
    forms = Forms(compression, shapes, found, stats)
    leaves = {path: w for path, w in named_leaves(shapes) if hasattr(w, "dtype")}
    rows, working = [], 0
    for path, w in leaves.items():
        form = _form(path, w, recipe, forms, found)
        working = max(working, form.working)
        rows.append(_row(path, w, form, recipe, forms, found.get(path), on))
    return Plan(leaves=rows, total=_total(rows, working, array_bytes((args, outputs)), on))


def _abstract(x: Leaf) -> Leaf:
    arrays = hasattr(x, "shape") and hasattr(x, "dtype")
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if arrays else x


def _outputs(fn: Callable[..., PyTree], params: PyTree, args: tuple[PyTree, ...]) -> PyTree:
    """The types of the results; arguments that are not arrays stay static."""
    leaves, treedef = jax.tree.flatten((params, args))
    at = [i for i, x in enumerate(leaves) if hasattr(x, "shape")]

    def run(arrays: list[jax.Array]) -> PyTree:
        new = dict(zip(at, arrays, strict=True))
        given, rest = jax.tree.unflatten(treedef, [new.get(i, x) for i, x in enumerate(leaves)])
        return lift(fn)(given, *rest)

    return jax.eval_shape(run, [_abstract(leaves[i]) for i in at])


def _form(
    path: str,
    w: Leaf,
    recipe: Compression | Recipe,
    forms: Forms,
    found: Mapping[str, Sequence[Use] | None],
) -> Form:
    """What becomes of a leaf."""
    if path in forms.asked:
        return forms.of(path, w)
    taken = not forms.known and not _why_skipped(path, w, recipe, found)
    size = None if taken else stored_bytes(w)
    return Form("by values" if taken else None, size, False, 0, w)


def _why_skipped(
    path: str, w: Leaf, recipe: Compression | Recipe, found: Mapping[str, Sequence[Use] | None]
) -> str | None:
    """Why a leaf stays as it is, as far as the recipe and the function say."""
    if not is_float(w):
        return f"{w.dtype} is not floating"
    if isinstance(recipe, Mapping) and _rule(path, w, recipe) is None:
        return "no rule takes it"
    if len(w.shape) < 2:
        return f"rank {len(w.shape)}"
    return None if found.get(path) else "meets no product or lookup"


def _rule(path: str, w: Leaf, recipe: Compression | Recipe) -> str | None:
    """The pattern that takes a leaf."""
    patterns = recipe if isinstance(recipe, Mapping) else ()
    taken = next((globs for globs in patterns if fit_of(globs, path, w)), None)
    if isinstance(taken, tuple):
        return " | ".join(str(getattr(glob, "pattern", glob)) for glob in taken)
    return None if taken is None else str(getattr(taken, "pattern", taken))


def _row(
    path: str,
    w: Leaf,
    form: Form,
    recipe: Compression | Recipe,
    forms: Forms,
    found: Sequence[Use] | None,
    chip: Chip | None,
) -> dict[str, Any]:
    size, dense = math.prod(w.shape), stored_bytes(w)
    runs = w if form.leaf is None else form.leaf
    taken = path in forms.asked or form.method is not None
    left = "left out by where=" if taken is False else None
    row = {
        "path": path,
        "shape": list(w.shape),
        "dtype": str(w.dtype),
        "rule": _rule(path, w, recipe) if taken else None,
        "method": form.method,
        "call": forms.asked.get(path),
        "skipped": None if taken else _why_skipped(path, w, recipe, {path: found}) or left,
        "dense_bytes": dense,
        "stored_bytes": form.bytes,
        "ratio": dense / form.bytes if form.bytes else None,
        "bits_per_weight": 8 * form.bytes / size if form.bytes is not None and size else None,
        "flops": product_flops(found, runs) if found else None,
        "dense_flops": product_flops(found, w) if found else None,
        "moved_bytes": read_bytes(found, form.bytes),
        "dense_moved_bytes": read_bytes(found, dense),
        "estimated": form.estimated,
    }
    if chip is not None:
        after = _roofline(row["flops"], row["moved_bytes"], chip, runs_in_integers(runs))
        before = _roofline(row["dense_flops"], row["dense_moved_bytes"], chip, False)
        row["microseconds"], row["bound"] = after
        row["dense_microseconds"] = before[0]
    return row


def _roofline(
    flops: int | None, moved: int | None, chip: Chip, integers: bool
) -> tuple[float | None, str | None]:
    """Microseconds that a chip needs at least, and which of the two takes them."""
    if moved is None:
        return None, None
    reading = 1e6 * moved / chip.bytes_per_second
    computing = 1e6 * (flops or 0) / (chip.int8_ops if integers else chip.flops)
    if not reading and not computing:
        return 0.0, None
    return max(reading, computing), "memory" if reading >= computing else "arithmetic"


def _total(
    rows: list[dict[str, Any]], working: int, inputs_and_outputs: int, chip: Chip | None
) -> dict[str, Any]:
    def total(key: str) -> Any:
        known = [row[key] for row in rows]
        return None if None in known else sum(known)

    size, stored = sum(math.prod(row["shape"]) for row in rows), total("stored_bytes")
    found: dict[str, Any] = {
        "size": size,
        "dense_bytes": total("dense_bytes"),
        "stored_bytes": stored,
        "ratio": total("dense_bytes") / stored if stored else None,
        "bits_per_weight": 8 * stored / size if stored and size else None,
        "flops": sum(row["flops"] or 0 for row in rows),
        "peak_bytes": None if stored is None else total("dense_bytes") + stored + working,
        "estimated": any(row["estimated"] for row in rows),
    }
    for key in ("moved_bytes", "dense_moved_bytes"):
        found[key] = None if total(key) is None else total(key) + inputs_and_outputs
    if chip is not None:
        others = 1e6 * inputs_and_outputs / chip.bytes_per_second
        found["chip"] = chip.name
        for key in ("microseconds", "dense_microseconds"):
            found[key] = None if total(key) is None else total(key) + others
    return found
