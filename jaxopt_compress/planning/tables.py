"""Tables of figures, as text and by rich."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxopt_compress.extras import require


class Table(NamedTuple):
    """Cells as text.

    Attributes:
        titles: The titles of the columns.
        rows: One list of cells each.
        total: The last row, set apart; empty if there is none.
        right: Which columns are aligned on the right.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: Sequence[str]
    right: Sequence[bool]


def as_text(table: Table) -> str:
    """Lines of aligned columns.

    Example:
        >>> print(
        ...     as_text(Table(["leaf", "bytes"], [["w", "8"], ["bias", "16"]], [], [False, True]))
        ... )
        leaf  bytes
        ----  -----
        w         8
        bias     16
    """
    total = [table.total] if table.total else []
    lines = [table.titles, *table.rows, *total]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    below = [rule, *total] if total else []
    return "\n".join(
        "  ".join(
            cell.rjust(width) if from_right else cell.ljust(width)
            for cell, width, from_right in zip(line, widths, table.right, strict=True)
        ).rstrip()
        for line in (table.titles, rule, *table.rows, *below)
    )


def as_rich(table: Table) -> Any:
    """A table of rich.

    Raises:
        ModuleNotFoundError: rich is missing.
    """
    made = require("rich.table", extra="cli").Table(show_footer=bool(table.total))
    Text = require("rich.text", extra="cli").Text
    total = table.total or [""] * len(table.titles)
    for title, footer, from_right in zip(table.titles, total, table.right, strict=True):
        side = "right" if from_right else "left"
        made.add_column(title, footer, justify=side, no_wrap=True)
    for row in table.rows:
        # Not markup: paths may hold brackets.
        made.add_row(*map(Text, row))
    return made
