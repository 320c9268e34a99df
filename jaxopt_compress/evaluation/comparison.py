"""The table of a comparison."""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from jaxopt_compress.extras import require
from jaxopt_compress.planning import charts
from jaxopt_compress.planning.html import (
    Section,
    as_html,
    leaf_sections,
    recipe_section,
    write_page,
)
from jaxopt_compress.planning.report import Report
from jaxopt_compress.planning.tables import Table, as_rich, as_text
from jaxopt_compress.typing import Leaf


class Comparison(dict[str, dict[str, Any]]):
    """A table of variants that is also a plain dict: ``{variant: {figure: value}}``.

    Figures that do not apply are absent. Besides the metrics a variant has

    - ``agreement``: the share of examples with the first variant's answer (class of the highest
      score), if outputs are scores of classes;
    - ``difference``: ``||y - y_first||_F / ||y_first||_F`` over all outputs;
    - ``paired``: for each metric that is a mean over examples, and each variant but the first,
      ``difference``, its 95% interval ``low`` and ``high``, ``p``, the ``test``, and whether it is
      ``noise``;
    - ``attribution_cosine``, ``attribution_rank``: how alike the gradients by the inputs are to the
      first variant's, of the score of its answer, as means over examples of cosines and of
      Spearman's correlations;
    - ``membership_auc``: how well the loss tells examples of the training from others: the
      probability that a member has the lower one; 0.5 if it does not;
    - ``layers``: for each parameter the relative error of the outputs of its products;
    - ``stored_bytes``, their ``ratio`` to the first variant's, and ``resident_bytes``;
    - ``flops``: floating operations of all products with parameters in a call on the first batch,
      those with both factors of a low-rank parameter, unless a loop's length is unknown. Products
      of activations with each other are not counted;
    - ``moved_bytes``: what such a call has to move at least: parameters as they are stored, inputs
      and outputs, once; and ``microjoules``, an estimate from both by published energies per
      operation and byte (Horowitz, 2014);
    - ``milliseconds``: ``{"median", "low", "high"}`` of a compiled call on the first batch, with a
      95% confidence interval; ``time_ratio``: likewise, of the ratio to the first variant's time in
      the same round, and whether it is ``noise``, its interval holding 1;
      ``examples_per_second`` by the median; ``compile_seconds``, with tracing; ``peak_bytes``, what
      the program needs, arguments and results included, by its compiler. They are there if there
      were rounds.

    `json.dumps` takes it as it is, up to metrics that are NaN; `str` and rich print it as tables.
    """

    def __str__(self) -> str:
        return "\n\n".join(map(as_text, self.tables()))

    def __rich__(self) -> Any:

        group = require("rich.console", extra="cli").Group
        return group(*map(as_rich, self.tables()))

    def html(
        self,
        path: str | os.PathLike[str],
        *,
        title: str = "Comparison",
        recipe: str | None = None,
        reports: Mapping[str, Report] | None = None,
    ) -> None:
        """Writes one HTML file that needs no network: tables, quality against bytes, layers.

        Args:
            path: The file.
            title: The title of the page.
            recipe: Its text.
            reports: Name -> what `report` found, best with ``histograms``: adds their sections.

        Raises:
            ModuleNotFoundError: vl-convert is missing.
        """
        write_page(path, title, [*self._sections(), *_of_reports(reports), recipe_section(recipe)])

    def _sections(self) -> list[Section]:
        size = lambda row: row["stored_bytes"]
        first = next(iter(self.values()), {})
        plain = [n for n, x in first.items() if isinstance(x, float) and n not in FIGURES]
        plain = [n for n in plain if "/" not in n]
        points = lambda n: [
            {"variant": name, "bytes": size(row), n: row[n]}
            for name, row in self.items()
            if size(row) and math.isfinite(row[n])
        ]
        against = [
            charts.figure(f"{n} against bytes", charts.scatter(points(n), "bytes", n, "variant"))
            for n in plain
            if points(n)
        ]
        layers = [
            {"leaf": leaf, "output error": error, "variant": name}
            for name, row in self.items()
            for leaf, error in row.get("layers", {}).items()
            if error
        ]
        caption = "Relative error of the outputs of each parameter"
        bars = lambda: charts.bars(layers, "leaf", "output error", "variant")
        return [
            Section("Before and after", [as_html(table) for table in self.tables()]),
            Section("Differences and noise", [as_html(t) for t in _paired(self)]),
            Section("Quality against bytes", against),
            Section("Error by layer", [charts.figure(caption, bars())] if layers else []),
            Section("Classes", [as_html(t) for t in _classes(self)]),
        ]

    def tables(self) -> list[Table]:
        """How variants answer, also under each corruption, and their cost."""
        names = [n for row in self.values() for n in row]
        table = lambda n: any(isinstance(row.get(n), dict) for row in self.values())
        names = [n for n in dict.fromkeys(names) if n in COSTS or not table(n)]
        answers = [n for n in names if n not in COSTS and "/" not in n]
        under = dict.fromkeys(n.split("/")[0] for n in names if "/" in n)
        parts = [[n for n in names if n.startswith(f"{name}/")] for name in under]
        costs = [n for n in names if n in COSTS]
        return [
            self._table("variant", self._with_tests(answers)),
            *(
                self._table(f"under {name}", [self._column(n) for n in own])
                for name, own in zip(under, parts, strict=True)
            ),
            self._table("variant", [self._column(n) for n in costs]),
        ]

    def _column(self, name: str) -> "_Column":
        title = _TITLES.get(name, name.rpartition("/")[2])
        return title, lambda row: _cell(name, row.get(name))

    def _with_tests(self, names: list[str]) -> list["_Column"]:
        """Columns, each with that of its test behind it, if there is one."""
        tested = {metric for row in self.values() for metric in row.get("paired", ())}
        p = lambda row, metric: row.get("paired", {}).get(metric, {}).get("p")
        columns: list[_Column] = []
        for name in names:
            columns.append(self._column(name))
            if name in tested:
                columns.append((f"p of {name}", lambda row, n=name: _cell("p", p(row, n))))
        return columns

    def _table(self, corner: str, columns: list["_Column"]) -> Table:
        rows = [[name, *(cell(row) for _, cell in columns)] for name, row in self.items()]
        titles = [corner, *(title for title, _ in columns)]
        return Table(titles, rows, [], [False, *(True for _ in columns)])


_Column = tuple[str, Callable[[Any], str]]
_NESTED = ("paired", "layers")
_TITLES = {
    "stored_bytes": "bytes",
    "resident_bytes": "in memory",
    "moved_bytes": "moved",
    "microjoules": "uJ",
    "milliseconds": "ms",
    "time_ratio": "time, of the first's",
    "examples_per_second": "examples/s",
    "compile_seconds": "compile s",
    "peak_bytes": "peak",
}
COSTS: dict[str, Callable[[Any], str]] = {
    "stored_bytes": "{:,}".format,
    "ratio": "{:.2f}".format,
    "resident_bytes": "{:,}".format,
    "flops": "{:.3g}".format,
    "moved_bytes": "{:,}".format,
    "microjoules": "{:.3g}".format,
    "milliseconds": lambda t: "{median:.4g} [{low:.4g}, {high:.4g}]".format(**t),
    "time_ratio": lambda t: (
        "{median:.2f} [{low:.2f}, {high:.2f}]".format(**t) + ", noise" * t["noise"]
    ),
    "examples_per_second": "{:,.0f}".format,
    "compile_seconds": "{:.2f}".format,
    "peak_bytes": "{:,}".format,
}
_FORMATS: dict[str, Callable[[Any], str]] = {
    **COSTS,
    "difference": "{:.1e}".format,
    "p": "{:.2g}".format,
}
# The names that metrics cannot have.
FIGURES = (*COSTS, *_NESTED, "agreement", "difference", "attribution_cosine", "attribution_rank",
           "membership_auc")  # fmt: skip


def _paired(found: Comparison) -> list[Table]:
    titles = ["variant", "metric", "difference", "95% interval", "p", "test", "noise"]
    rows = []
    for name, row in found.items():
        for metric, own in row.get("paired", {}).items():
            interval = f"[{own['low']:+.4f}, {own['high']:+.4f}]"
            p, word = _cell("p", own["p"]), "yes" if own["noise"] else "no"
            rows.append([name, metric, f"{own['difference']:+.4f}", interval, p, own["test"], word])
    right = [False, False, True, True, True, False, False]
    return [Table(titles, rows, [], right)] if rows else []


def _classes(found: Comparison) -> list[Table]:
    tables = [(name, row["per_class"]) for name, row in found.items() if "per_class" in row]
    if not tables:
        return []
    kinds = ("recall", "precision", "f1")
    titles = ["class", *(f"{kind}, {name}" for kind in kinds for name, _ in tables)]
    count = len(tables[0][1]["recall"])
    cells = lambda c: [_cell(kind, table[kind][c]) for kind in kinds for _, table in tables]
    rows = [[str(c), *cells(c)] for c in range(count)]
    return [Table(titles, rows, [], [False, *(True for _ in titles[1:])])]


def _of_reports(reports: Mapping[str, Report] | None) -> list[Section]:
    """The sections of reports, with the names of their variants."""
    return [
        section._replace(title=f"{section.title}: {name}")
        for name, each in (reports or {}).items()
        for section in leaf_sections(each["leaves"])
    ]


def _cell(name: str, value: Leaf) -> str:
    return "" if value is None else _FORMATS.get(name, "{:.4f}".format)(value)
