"""Allocation within budgets, against every choice that there is."""

import itertools
import math

import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.planning.costs import Running
from jaxopt_compress.planning.sensitivity_table import Cell, Sensitivities
from tests.planning.tables import random_table


def test_a_candidate_that_diverges_is_never_chosen():
    table = random_table(np.random.default_rng(0))
    for bad in (math.inf, math.nan):
        table.cells["r0"]["a"] = Cell(1, 0.5, bad)
        assert jc.allocate(table, jc.bytes(0.9)).choices["r0"] != "a"
        assert table.least_bytes > 4 * 50


@pytest.mark.parametrize("seed", range(8))
def test_budgets_of_several_kinds_all_hold(seed):
    """Each alone, and all of them, against every choice there is."""
    table = random_table(np.random.default_rng(seed))
    chip = "tpu v5e"  # 819 bytes in a nanosecond.
    budgets = {
        "flops": (jc.flops(0.6), lambda cells: 200 + sum(c.running.flops for c in cells) <= 1320),
        "share": (jc.traffic(0.5), lambda cells: sum(c.running.moved for c in cells) <= 1975),
        "chip": (
            jc.traffic(microseconds=0.002, chip=chip),
            lambda cells: 50 + sum(c.running.moved for c in cells) <= 1638,
        ),
        "bytes": (jc.bytes(0.6), lambda cells: 100 + sum(c.bytes for c in cells) <= 2460),
    }
    every = [
        [table.cells[row][name] for row, name in zip(table.cells, names, strict=True)]
        for names in itertools.product(*table.cells.values())
    ]
    for asked in (*([name] for name in budgets), list(budgets)):
        fits = [cells for cells in every if all(budgets[name][1](cells) for name in asked)]
        given = [budgets[name][0] for name in asked]
        if not fits:
            with pytest.raises(ValueError, match="no choice fits"):
                jc.allocate(table, given)
            continue
        found = jc.allocate(table, given[0] if len(given) == 1 else given)
        best = min(sum(c.measured for c in cells) for cells in fits)
        assert found.increase == pytest.approx(best)
        assert [table.cells[row][name] for row, name in found.choices.items()] in fits


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_allocation_is_the_best_of_all_choices(seed, share):
    table = random_table(np.random.default_rng(seed))
    limit, best = share * table.dense_bytes - table.rest, math.inf
    for names in itertools.product(*table.cells.values()):
        chosen = [table.cells[row][name] for row, name in zip(table.cells, names, strict=True)]
        if sum(c.bytes for c in chosen) <= limit:
            best = min(best, sum(c.measured for c in chosen))
    if best == math.inf:
        with pytest.raises(ValueError, match="no choice fits"):
            jc.allocate(table, jc.bytes(share))
        return
    found = jc.allocate(table, jc.bytes(share))
    assert found.increase == pytest.approx(best)
    assert found.bytes <= share * table.dense_bytes


@pytest.mark.parametrize("seed", range(5))
def test_candidates_that_ruin_the_model_hide_no_others(seed):
    """Increases of one candidate are up to 1e9 times those of the others, of each row."""
    table = random_table(np.random.default_rng(seed))
    for i, cells in enumerate(table.cells.values()):
        cells["a"] = Cell(50, 0.0, cells["a"].measured * 1e9 ** (i % 2))
        cells["b"] = cells["b"]._replace(measured=cells["b"].measured * 0.01)
    limit = 0.5 * table.dense_bytes - table.rest
    rows = [list(cells.values()) for cells in table.cells.values()]
    fits = (own for own in itertools.product(*rows) if sum(c.bytes for c in own) <= limit)
    best = min(sum(c.measured or 0.0 for c in own) for own in fits)
    assert jc.allocate(table, jc.bytes(0.5)).increase == pytest.approx(best)


@pytest.mark.parametrize("size", [10**9 + 7, 10**16])
def test_budgets_of_any_size_hold_exactly(size):
    """Of two rows one has to shrink; of 1 operation less than one dense row and one small, both."""
    cells = {
        row: {
            "dense": Cell(400, 0.0, 0.0, Running(size, 400)),
            "small": Cell(100, 0.0, cost, Running(size // 4, 100)),
        }
        for row, cost in (("a", 0.1), ("b", 0.7))
    }
    rows = {"a": ["a"], "b": ["b"]}
    table = Sensitivities(cells, rows, {"small": jc.quantize("int8")}, 1.0, 0, Running(0, 0))
    chosen = lambda share: jc.allocate(table, jc.flops(share)).choices
    least = (size + size // 4) / (2 * size)
    assert chosen(0.7) == {"a": "small", "b": "dense"}
    assert chosen(least * (1 - 1e-9)) == {"a": "small", "b": "small"}
    with pytest.raises(ValueError, match="give at least one budget"):
        jc.allocate(table, [])
