"""The candidate for each parameter that keeps a budget at the least increase of the loss."""

import glob
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxopt_compress.compression import Compression
from jaxopt_compress.extras import require
from jaxopt_compress.planning.budgets import Budget, Flops, Traffic
from jaxopt_compress.planning.costs import Running
from jaxopt_compress.planning.sensitivity_table import DENSE, Sensitivities
from jaxopt_compress.tree.budgets import Bytes, bytes


class Allocation(dict[Any, Compression]):
    """A recipe ``{paths: compression}``, for `compress` and for training.

    Attributes:
        choices: Row of the table -> the name of its candidate.
        bytes: What all parameters take.
        increase: The increase of the loss, if those of all rows add up.
    """

    def __init__(
        self, recipe: dict[Any, Compression], choices: dict[str, str], bytes: int, increase: float
    ):
        super().__init__(recipe)
        self.choices, self.bytes, self.increase = choices, bytes, increase


def allocate(table: Sensitivities, budget: Budget | Sequence[Budget]) -> Allocation:
    r"""Chooses a candidate for each row, such that all of them fit a budget.

    .. math:: \min_x \sum_{r,c} x_{rc} \Delta_{rc} \quad \text{with} \quad
        \sum_c x_{rc} = 1, \quad \sum_{r,c} x_{rc} b_{rc} \le B, \quad x_{rc} \in \{0, 1\}

    solved exactly by SciPy's mixed-integer solver. Another budget needs no new measurements.

    Args:
        table: What `sensitivities` returned.
        budget: One, or several that all hold: `jaxopt_compress.bytes` of a share of the stored
            bytes; `jaxopt_compress.flops` of a share of the operations of products with parameters,
            those of low-rank candidates by their factors, and without indices that are masked
            throughout, as those that a plan of `find_groups` masks; `jaxopt_compress.traffic` of
            what a call reads.

    Returns:
        A recipe for all rows that are not left dense, with its `choices`, `bytes` and `increase`.

    Raises:
        ValueError: Nothing fits the budget; says what the smallest choice takes. Or no budget is
            given, or the table was made without ``uses=``, which operations and what is read need.
        RuntimeError: The solver found no answer for another reason; says its message.
        TypeError: ``budget`` is something else.

    Example:
        >>> import jaxopt_compress as jc
        >>> from jaxopt_compress.planning.sensitivity_table import Cell
        >>> cells = {
        ...     "a": {"dense": Cell(400, 0.0, 0.0), "int8": Cell(100, 0.0, 0.1)},
        ...     "b": {"dense": Cell(400, 0.0, 0.0), "int8": Cell(100, 0.0, 0.7)},
        ... }
        >>> rows = {"a": ["a"], "b": ["b"]}
        >>> table = Sensitivities(cells, rows, {"int8": jc.quantize("int8")}, 1.0, rest=0)
        >>> allocate(table, jc.bytes(0.7)).choices
        {'a': 'int8', 'b': 'dense'}
    """
    budgets = [budget] if isinstance(budget, Budget) else budget
    if not isinstance(budgets, Sequence) or not all(isinstance(b, Budget) for b in budgets):
        raise TypeError(f"budget={budget!r}; jaxopt_compress.bytes(0.25) is one")
    if not budgets:
        raise ValueError("budget=[]: give at least one budget, such as jaxopt_compress.bytes(0.25)")
    optimize = require("scipy.optimize", extra="plan")
    pairs = table.choices()
    sizes = np.array([table.cells[row][name].bytes for row, name in pairs], float)
    costs = np.array([table.increase(row, name) for row, name in pairs])
    member = np.array([[row == own for own, _ in pairs] for row in table.cells], float)
    limits = [_limited(table, pairs, each) for each in budgets]
    solved = _solved(
        costs,
        sizes,
        [
            optimize.LinearConstraint(member, 1, 1),
            *(optimize.LinearConstraint(*_scaled(amounts, limit)) for amounts, limit in limits),
        ],
    )
    if solved.x is None and solved.status != _INFEASIBLE:
        raise RuntimeError(f"no choice was found for {budgets}: {solved.message}")
    if solved.x is None:
        raise ValueError(f"no choice fits all of {budgets}, each of which fits alone")
    taken = [i for i, x in enumerate(solved.x) if x > 0.5]
    return choose(table, {pairs[i][0]: pairs[i][1] for i in taken})


def _solved(costs: np.ndarray, sizes: np.ndarray, constraints: list[Any]) -> Any:
    """What the solver finds for the least sum of costs, which are at least 0.

    It stops within about 1e-6 of the least sum, in units of its objective: of the largest cost. So
    what costs more alone than a sum that was found, such as a candidate that ruins the model, is
    left out, and the rest is solved again in a smaller unit.
    """
    optimize = require("scipy.optimize", extra="plan")
    usable = np.ones(len(costs), bool)
    while True:
        unit = max(costs[usable].max(), np.finfo(float).tiny)
        solved = optimize.milp(
            # Bytes break ties.
            np.where(usable, costs, 0) / unit + 1e-9 * sizes / sizes.max(),
            integrality=np.ones(len(costs)),
            bounds=optimize.Bounds(0, usable.astype(float)),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if solved.x is None:
            return solved
        worse = usable & (costs > costs[solved.x > 0.5].sum())
        if not worse.any():
            return solved
        usable &= ~worse


def _scaled(amounts: np.ndarray, limit: float) -> tuple[np.ndarray, float, float]:
    """Coefficients, lower and upper bound of ``sum(amounts) <= limit``, for the solver.

    It refuses coefficients from 1e15 on, and lets sums exceed a bound by about 1e-6: so that these
    are not whole bytes, only large limits are scaled.
    """
    unit = max(1.0, limit / 2**30)
    # What is above the limit alone stays above it.
    return np.minimum(amounts, 2 * limit + 1)[None] / unit, -np.inf, limit / unit


def _limited(
    table: Sensitivities, pairs: Sequence[tuple[str, str]], budget: Budget
) -> tuple[np.ndarray, float]:
    """What each pair takes of a budget, and how much all rows may take of it.

    Raises:
        ValueError: The table does not say, or nothing fits.
    """
    what, key = _COUNTED[type(budget)]

    def amount(own: int, running: Running | None) -> float:
        found = own if key is None else getattr(running, key, None)
        if found is None:
            raise ValueError(
                f"budget={budget}: the table does not say {what}; it takes sensitivities(..., "
                "uses=) of a function without loops of unknown length"
            )
        return float(found)

    of_cell = lambda cell: amount(cell.bytes, cell.running)
    rest = amount(table.rest, table.rest_running)
    amounts = np.array([of_cell(table.cells[row][name]) for row, name in pairs])
    dense = rest + sum(of_cell(cells[DENSE]) for cells in table.cells.values())
    least = rest + sum(
        min(x for x, (own, _) in zip(amounts, pairs, strict=True) if own == row)
        for row in table.cells
    )
    most = budget.most if isinstance(budget, Traffic) else None
    limit = (budget.share or 1.0) * dense if most is None else most
    if least > limit:
        raise ValueError(
            f"no choice fits {limit / dense:.3g} of {what}: the smallest candidates take "
            f"{least / dense:.3g} with what is in no row; add smaller candidates, or raise the "
            "budget"
        )
    return amounts, limit - rest


# The status by which SciPy's solver says that there is no solution.
_INFEASIBLE = 2

# What a budget is of, and the name of its figure in `Running`; None for stored bytes.
_COUNTED: dict[type, tuple[str, str | None]] = {
    Bytes: ("the bytes", None),
    Flops: ("the operations", "flops"),
    Traffic: ("the bytes that a call reads", "moved"),
}


def choose(table: Sensitivities, choices: dict[str, str]) -> Allocation:
    """The allocation that gives each row the candidate named.

    Args:
        table: What `sensitivities` returned.
        choices: Row -> the name of its candidate, or ``"dense"``; of all rows.
    """
    total = table.rest + sum(table.cells[row][name].bytes for row, name in choices.items())
    increase = sum(table.increase(row, name) for row, name in choices.items())
    return Allocation(_recipe(table, choices), choices, total, increase)


def _recipe(table: Sensitivities, choices: dict[str, str]) -> dict[Any, Compression]:
    """One rule per candidate; paths as globs that match themselves alone."""
    by_name: dict[str, list[str]] = {}
    for row, name in choices.items():
        if name != DENSE:
            by_name.setdefault(name, []).extend(map(glob.escape, table.rows[row]))
    return {tuple(paths): table.candidates[name] for name, paths in by_name.items()}


__all__ = ["Allocation", "Bytes", "allocate", "bytes", "choose"]
