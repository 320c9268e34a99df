"""Reports as one HTML file that needs no network: tables, charts drawn as SVG, recipes."""

import html
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxopt_compress.planning import charts
from jaxopt_compress.planning.tables import Table
from jaxopt_compress.sparsity.schedule import Schedule

_STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #f6f8fa; --text: #1f2328; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3d444d; --soft: #151b23; --text: #e6edf3; }
  body { background: #0d1117; }
}
body { color: var(--text); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem;
  padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left;
  white-space: nowrap; }
thead th { background: var(--soft); }
tfoot td { font-weight: 600; }
.right { text-align: right; }
figure { display: inline-block; margin: 1rem 1rem 0 0; max-width: 100%; vertical-align: top; }
figcaption { font-size: .9rem; margin-bottom: .4rem; }
svg { color: var(--text); height: auto; max-width: 100%; }
pre { background: var(--soft); border: 1px solid var(--line); overflow-x: auto; padding: .8rem; }
"""


class Section(NamedTuple):
    """A part of a page.

    Attributes:
        title: Its heading.
        parts: HTML, one after the other.
    """

    title: str
    parts: Sequence[str]


def write_page(path: str | os.PathLike[str], title: str, sections: Sequence[Section]) -> None:
    """Writes sections that have parts as one file."""
    shown = [
        f"<section><h2>{html.escape(s.title)}</h2>{''.join(s.parts)}</section>"
        for s in sections
        if s.parts
    ]
    name = html.escape(title)
    pathlib.Path(path).write_text(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{_STYLE}</style></head>"
        f"<body><main><h1>{name}</h1>{''.join(shown)}</main></body></html>\n",
        encoding="utf-8",
    )


def as_html(table: Table) -> str:
    """A table that scrolls by itself where the screen is narrow."""

    def line(cells: Sequence[str], tag: str, scope: str = "") -> str:
        made = []
        for cell, right in zip(cells, table.right, strict=True):
            side = ' class="right"' if right else ""
            made.append(f"<{tag}{scope}{side}>{html.escape(cell)}</{tag}>")
        return f"<tr>{''.join(made)}</tr>"

    head = line(table.titles, "th", ' scope="col"')
    body = "".join(line(row, "td") for row in table.rows)
    foot = f"<tfoot>{line(table.total, 'td')}</tfoot>" if table.total else ""
    whole = f"<table><thead>{head}</thead><tbody>{body}</tbody>{foot}</table>"
    return f'<div class="scroll" tabindex="0">{whole}</div>'


def recipe_section(recipe: str | None) -> Section:
    """The text of a recipe."""
    return Section("Recipe", [f"<pre>{html.escape(recipe)}</pre>"] if recipe else [])


def schedule_section(
    schedules: Mapping[str, Schedule | Callable[[Any], Any]] | None, steps: int | None
) -> Section:
    """Curves of schedules over updates.

    Raises:
        ValueError: There are schedules, and no number of steps.
    """
    if not schedules:
        return Section("Schedules", [])
    if steps is None or steps < 1:
        raise ValueError(f"schedules= needs steps=, the number of updates to show, not {steps}")
    at = np.unique(np.linspace(0, steps, 101).astype(int))
    rows = [
        {"update": int(i), "value": float(value(int(i))), "schedule": name}
        for name, schedule in schedules.items()
        for value in [schedule.sparsity if isinstance(schedule, Schedule) else schedule]
        for i in at
    ]
    spec = charts.lines(rows, "update", "value", "schedule")
    return Section("Schedules", [charts.figure("Schedules by update", spec)])


def leaf_sections(leaves: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Errors, bits, sparsity and histograms of the leaves of a report."""
    known = lambda key: [
        {"leaf": row["path"], key: row[key]} for row in leaves if row.get(key) is not None
    ]
    errors = [
        charts.figure(caption, charts.bars(known(key), "leaf", key, None))
        for key, caption in (
            ("output_error", "Relative error of the outputs of each parameter"),
            ("relative_error", "Relative error of each parameter"),
        )
        if known(key)
    ]
    maps = [
        charts.figure(caption, charts.heat(known(key), "leaf", key))
        for key, caption in (
            ("bits_per_weight", "Bits per weight"),
            ("sparsity", "Share of zeros"),
        )
        if known(key)
    ]
    counts = [row for leaf in leaves for row in _histogram(leaf)]
    weights = [charts.figure("Weights before and after", charts.histograms(counts))] * bool(counts)
    return [
        Section("Error by layer", errors),
        Section("Bits and sparsity", maps),
        Section("Weights", weights),
    ]


def _histogram(leaf: Mapping[str, Any]) -> list[dict[str, object]]:
    found = leaf.get("histogram")
    if not found:
        return []
    width = (found["high"] - found["low"]) / len(found["before"])
    return [
        {
            "leaf": leaf["path"],
            "tree": tree,
            "weight": found["low"] + (i + 0.5) * width,
            "entries": n,
        }
        for tree in ("before", "after")
        for i, n in enumerate(found[tree])
    ]
