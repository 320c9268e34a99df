"""Figures that several runs collect: a JSON file of rows, and one table of all of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


class Results:
    """Rows by name, kept in a file if there is one, so that a later run measures only the others.

    Args:
        path: The file, or None.
        settings: What all rows have in common, such as the number of calibration batches.

    Raises:
        ValueError: The file is of other settings.
    """

    def __init__(self, path: str | None, settings: dict[str, Any]):
        self.path = Path(path) if path else None
        self.settings, self.rows = settings, {}
        if self.path and self.path.exists():
            kept = json.loads(self.path.read_text())
            if kept["settings"] != settings:
                raise ValueError(f"{path} is of {kept['settings']}, not of {settings}")
            self.rows = kept["rows"]

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of this name, measured if no run before did so."""
        if name not in self.rows:
            self.rows[name] = measure()
            if self.path:
                # Renamed when complete, so that an interruption loses no earlier row.
                new = self.path.with_suffix(".new")
                new.write_text(json.dumps({"settings": self.settings, "rows": self.rows}, indent=1))
                new.replace(self.path)
        return self.rows[name]


def show(title: str, columns: list[str], lines: dict[str, list[str]]) -> None:
    """Prints a table with a line per name."""
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for name, cells in lines.items():
        table.add_row(name, *cells)
    # As wide as it is, also where the output is a file.
    Console(width=200).print(table)
