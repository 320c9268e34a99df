"""What a compression has saved, and what it has cost."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import describe, is_compressed
from jaxopt_compress.arrays.base import stored_bytes
from jaxopt_compress.compression.best_of import BestState
from jaxopt_compress.compression.compress import Globs
from jaxopt_compress.lift import Statistics, Stats, Uses
from jaxopt_compress.planning.html import (
    Section,
    as_html,
    leaf_sections,
    recipe_section,
    schedule_section,
    write_page,
)
from jaxopt_compress.planning.leaf_errors import (
    entry_errors,
    histogram,
    norms,
    output_errors,
    stacks_of,
)
from jaxopt_compress.planning.tables import Table, as_rich, as_text
from jaxopt_compress.sparsity.schedule import Schedule
from jaxopt_compress.tree import named_leaves
from jaxopt_compress.typing import Leaf, PyTree


class Report(dict[str, Any]):
    """A table of leaves that is also a plain dict: ``{"leaves": [row, ...], "total": row}``.

    A row has ``path``, ``shape``, ``dtype``, ``method``, ``bits_per_weight``, ``stored_bytes``,
    ``dense_bytes``, ``ratio`` (of these two), ``sparsity`` (the share of zeros in the dense form)
    and ``relative_error`` (``||w - materialize(small)||_F / ||w||_F``). With statistics it has
    ``output_error``, ``sqrt(tr(D^T H D) / tr(W^T H W))``. Where it is a stack, as ``uses=`` or
    ``stack=`` say or statistics show, it has the same for each entry, as lists ``errors`` and
    ``output_errors``, with their largest, ``worst_error`` and ``worst_output_error``. With the
    state of `best_of` it has ``choice``, the position of the candidate that was chosen, from 0, and
    ``choices``, the errors of all. The total has ``size``, the number of entries, in the place of
    shape and dtype. Unknown values are None. `json.dumps` takes it as it is; `str` and rich print
    it as a table.
    """

    def __str__(self) -> str:
        return as_text(self._table())

    def __rich__(self) -> Any:
        return as_rich(self._table())

    def html(
        self,
        path: str | os.PathLike[str],
        *,
        title: str = "Compression report",
        recipe: str | None = None,
        schedules: Mapping[str, Schedule | Callable[[Any], Any]] | None = None,
        steps: int | None = None,
    ) -> None:
        """Writes one HTML file that needs no network: the table, charts by leaf, and the recipe.

        Args:
            path: The file.
            title: The title of the page.
            recipe: Its text, such as that of a file for `read_recipe`.
            schedules: Name -> one of `jaxopt_compress.schedules`, or a function of the update.
            steps: How many updates of them.

        Raises:
            ModuleNotFoundError: vl-convert is missing.
        """
        sections = [
            Section("Before and after", [as_html(self._table())]),
            *leaf_sections(self["leaves"]),
            schedule_section(schedules, steps),
            recipe_section(recipe),
        ]
        write_page(path, title, sections)

    def _table(self) -> Table:
        known = [c for c in _COLUMNS if any(row.get(c) is not None for row in self["leaves"])]
        columns = known or ["path"]
        text = lambda row, c: "" if row.get(c) is None else _COLUMNS[c][1](row[c])
        titles = [_COLUMNS[c][0] for c in columns]
        rows = [[text(row, c) for c in columns] for row in self["leaves"]]
        total = ["total" if c == "path" else text(self["total"], c) for c in columns]
        return Table(titles, rows, total, [c not in _LEFT for c in columns])


_COLUMNS = {
    "path": ("leaf", str),
    "shape": ("shape", lambda v: "x".join(map(str, v)) or "scalar"),
    "method": ("method", str),
    "layout": ("layout", str),
    "bits_per_weight": ("bits/weight", "{:.3g}".format),
    "dense_bytes": ("dense bytes", "{:,}".format),
    "stored_bytes": ("bytes", "{:,}".format),
    "ratio": ("ratio", lambda v: f"{v:.2f}{' (larger)' * (v < 1)}"),
    "sparsity": ("sparsity", "{:.1%}".format),
    "relative_error": ("rel. error", "{:.2e}".format),
    "worst_error": ("worst of stack", "{:.2e}".format),
    "output_error": ("output error", "{:.2e}".format),
    "worst_output_error": ("worst output", "{:.2e}".format),
    "choice": ("choice", str),
}
_LEFT = ("path", "shape", "method", "layout")


def report(
    params: PyTree,
    small: PyTree,
    stats: Mapping[str, Sequence[Statistics]] | None = None,
    state: PyTree = None,
    *,
    histograms: int = 0,
    uses: Uses | None = None,
    stack: Mapping[Globs, int] | None = None,
) -> Report:
    """Compares a compressed tree with what it was made of, leaf by leaf.

    Args:
        params: The tree before.
        small: The tree after: leaves of the same paths, in any containers.
        stats: What `calibrate` found, best on held-out batches: adds the relative errors of the
            outputs of each parameter's products, which no method has to help with.
        state: The state of `best_of`, or of a compression that holds one: adds which candidate was
            chosen.
        histograms: Into how many bins weights are counted, before and after: adds ``histogram`` to
            floating leaves, for `Report.html`. By default they are not.
        uses: What `uses` found: adds the errors of each entry of the stacks that it knows, such as
            scanned layers.
        stack: Glob -> how many leading axes are stacks, whatever uses say, such as
            ``{"experts/*": 1}`` where all experts meet the same inputs.

    Returns:
        The `Report`; at no time is more than one leaf materialized.

    Raises:
        TypeError: The first tree has compressed leaves and the second one has none.
        ValueError: The two trees have different leaves, a leaf has another shape, or ``stack``
            takes all axes of a leaf.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)}
        >>> found = jc.report(params, jc.compress(params, jc.quantize("int8")))
        >>> found["leaves"][0]["method"], found["total"]["stored_bytes"]
        ('int8', 16)
        >>> experts = {"w": jnp.stack([params["w"], params["w"] / 100])}
        >>> one_step = {"w": jnp.round(experts["w"] * 100) / 100}
        >>> jc.report(experts, one_step, stack={"w": 1})["leaves"][0]["errors"]
        [0.004..., 0.40...]
    """
    before, after = ({k: x for k, x in named_leaves(t) if _is_array(x)} for t in (params, small))
    if any(map(is_compressed, before.values())) and not any(map(is_compressed, after.values())):
        raise TypeError(
            "report(params, small) takes the parameters first, and then what they were compressed "
            "to; here only the first tree has compressed leaves"
        )
    unmatched = sorted(before.keys() ^ after.keys())
    if unmatched:
        where = "params" if unmatched[0] in before else "small"
        raise ValueError(f"only {where} has {unmatched[0]!r}: these trees have different leaves")
    stacks = stacks_of(before, uses, stack)
    rows = []
    for path, w in before.items():
        row, new = leaf_report(path, w, after[path]), after[path]
        _add_entries(row, w, new, stacks[path])
        _add_outputs(row, w, new, stats, stacks[path])
        if histograms and jnp.issubdtype(w.dtype, jnp.floating):
            row["histogram"] = histogram(histograms, w, new)
        rows.append(row)
    for best in _best_states(state):
        for row in rows:
            if row["path"] in best.chosen:
                row["choice"] = best.chosen[row["path"]]
                row["choices"] = [_finite(x) for x in best.errors[row["path"]].tolist()]
    return summarize(rows)


def _add_entries(row: dict[str, Any], w: Leaf, small: PyTree, stack: int) -> None:
    """The error of each entry of a stack."""
    if stack and jnp.issubdtype(w.dtype, jnp.floating):
        errors = entry_errors(w, small, stack)
        row["errors"], row["worst_error"] = _finite(errors.tolist()), _finite(float(errors.max()))


def _add_outputs(
    row: dict[str, Any], w: Leaf, small: PyTree, stats: Stats | None, stack: int
) -> None:
    """The errors of the outputs of products, as far as there are statistics."""
    own = next(iter((stats or {}).get(row["path"], ())), None)
    if own is None or not own.has("moments"):
        return
    found = output_errors(w, small, own, stack)
    row["output_error"] = _finite(float(found.whole))
    if found.each.ndim:
        row["output_errors"] = _finite(found.each.tolist())
        row["worst_output_error"] = _finite(float(found.each.max()))


def _best_states(state: PyTree) -> list[BestState]:
    is_best = lambda x: isinstance(x, BestState)
    return [x for x in jax.tree.leaves(state, is_leaf=is_best) if is_best(x)]


def _finite(x: Any) -> Any:
    """A number, or numbers in lists, with None where JSON has no number for it."""
    if isinstance(x, list):
        return [_finite(each) for each in x]
    return x if math.isfinite(x) else None


def leaf_report(path: str, w: Leaf, small: PyTree) -> dict[str, Any]:
    """One row of a `Report`.

    Args:
        path: The leaf's path.
        w: The parameter before, or None if it is not known: then ``small`` may be abstract.
        small: The parameter after.

    Raises:
        ValueError: The shapes differ.
    """
    shape = tuple(small.shape)
    if w is not None and tuple(w.shape) != shape:
        raise ValueError(f"{path!r} has shape {tuple(w.shape)} in params and {shape} in small")
    source = small if w is None else w
    dense = jax.ShapeDtypeStruct(shape, source.dtype)
    row: dict[str, Any] = {
        "path": path,
        "shape": list(shape),
        "dtype": str(source.dtype),
        "method": describe(small),
        "stored_bytes": stored_bytes(small),
        "dense_bytes": stored_bytes(dense),
        "sparsity": None,
        "relative_error": None,
    }
    if w is not None and jnp.issubdtype(source.dtype, jnp.number):
        row |= norms(w, small)
    return row


def summarize(rows: Sequence[dict[str, Any]]) -> Report:
    """A `Report` of the rows of `leaf_report`."""
    total: dict[str, Any] = {"path": "total", "size": sum(math.prod(r["shape"]) for r in rows)}
    for key in ("stored_bytes", "dense_bytes"):
        total[key] = sum(r[key] for r in rows)
    known = [r for r in rows if "norm" in r]
    if known:
        total["zeros"] = sum(r["zeros"] for r in known)
        for key in ("norm", "error_norm"):
            total[key] = math.hypot(*(r[key] for r in known))
    measured = sum(math.prod(r["shape"]) for r in known)
    leaves = [_finish(dict(r), math.prod(r["shape"]), math.prod(r["shape"])) for r in rows]
    return Report(leaves=leaves, total=_finish(total, total["size"], measured))


def _finish(row: dict[str, Any], size: int, measured: int) -> dict[str, Any]:
    """Quotients, in the place of the sums that they are made of."""
    row["bits_per_weight"] = _quotient(8 * row["stored_bytes"], size)
    row["ratio"] = _quotient(row["dense_bytes"], row["stored_bytes"])
    row["sparsity"] = row["relative_error"] = None
    if "norm" in row:
        norm, error = row.pop("norm"), row.pop("error_norm")
        row["sparsity"] = _quotient(row.pop("zeros"), measured)
        row["relative_error"] = 0.0 if error == 0 else _quotient(error, norm)
    return row


def _quotient(a: float, b: float) -> float | None:
    """``a / b``, or None where that is no finite number, which JSON cannot hold."""
    return a / b if b and math.isfinite(a) and math.isfinite(b) else None


def _is_array(x: Leaf) -> bool:
    return is_compressed(x) or (hasattr(x, "shape") and hasattr(x, "dtype"))
