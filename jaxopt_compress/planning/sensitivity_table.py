"""The table of sensitivities: parameters, candidates, and their increases of the loss."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxopt_compress.compression import Compression
from jaxopt_compress.planning.costs import Running
from jaxopt_compress.planning.tables import Table, as_rich, as_text

DENSE = "dense"


class Cell(NamedTuple):
    """One candidate for one row.

    Attributes:
        bytes: What the row takes when it is stored so.
        estimate: The increase of the loss, by the squared gradient of each entry.
        measured: The increase of the loss on held-out batches; None if it was not measured.
        running: What a call costs in the products of the row; None if uses were not given.
    """

    bytes: int
    estimate: float
    measured: float | None = None
    running: Running | None = None


class Sensitivities(NamedTuple):
    """A table of rows, which are parameters that share a choice, and candidates.

    Attributes:
        cells: Row -> candidate -> `Cell`. The candidate ``"dense"`` leaves the row as it is.
        rows: Row -> its paths.
        candidates: Name -> compression.
        loss: The loss on held-out batches before compression.
        rest: Bytes of all parameters that are in no row.
        rest_running: What a call costs in their products; None if uses were not given.
    """

    cells: dict[str, dict[str, Cell]]
    rows: dict[str, list[str]]
    candidates: dict[str, Compression]
    loss: float
    rest: int
    rest_running: Running | None = None

    @property
    def dense_bytes(self) -> int:
        """What all parameters take as they are."""
        return self.rest + sum(row[DENSE].bytes for row in self.cells.values())

    def choices(self) -> list[tuple[str, str]]:
        """Rows and candidates whose increase of the loss is a finite number."""
        pairs = [(row, name) for row, cells in self.cells.items() for name in cells]
        return [pair for pair in pairs if math.isfinite(self.increase(*pair))]

    @property
    def least_bytes(self) -> int:
        """What all parameters take with the smallest of `choices` in each row."""
        least = {row: cells[DENSE].bytes for row, cells in self.cells.items()}
        for row, name in self.choices():
            least[row] = min(least[row], self.cells[row][name].bytes)
        return self.rest + sum(least.values())

    def increase(self, row: str, name: str) -> float:
        """The increase of the loss: as measured, or as estimated, in proportion to what was.

        An estimate is scaled by the median of measured over estimated increases, of the same row if
        there are any, and of all rows otherwise.
        """
        cell = self.cells[row][name]
        if cell.measured is not None:
            # Not max(measured, 0.0), which is 0 for some orders of NaN.
            return 0.0 if cell.measured < 0 else cell.measured
        own = _ratios(self.cells[row].values())
        every = own or _ratios(c for cells in self.cells.values() for c in cells.values())
        return cell.estimate * (sorted(every)[len(every) // 2] if every else 1.0)

    def __str__(self) -> str:
        return as_text(self._table())

    def __rich__(self) -> Any:
        return as_rich(self._table())

    def _table(self) -> Table:
        names = list(self.candidates)
        rows = []
        for row, cells in self.cells.items():
            shown = [self._shown(row, name) if name in cells else "-" for name in names]
            rows.append([row, f"{cells[DENSE].bytes:,}", *shown])
        titles = ["increase of the loss (~: estimated)", "bytes", *names]
        return Table(titles, rows, [], [False] + [True] * (len(names) + 1))

    def _shown(self, row: str, name: str) -> str:
        sign = "~" if self.cells[row][name].measured is None else ""
        return f"{sign}{self.increase(row, name):.3g}"


def _ratios(cells: Iterable[Cell]) -> list[float]:
    """Measured over estimated increases, of those that are more than nothing."""
    both = [(c.measured, c.estimate) for c in cells if c.measured is not None and c.estimate > 0]
    return [m / e for m, e in both if m > 0 and math.isfinite(m / e)]
