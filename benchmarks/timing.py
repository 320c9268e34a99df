"""Interleaved timing, with intervals that need no assumption on how times are distributed."""

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxopt_compress.evaluation.timing import Estimate, Samples, interleave, median

__all__ = [
    "Estimate",
    "Samples",
    "compiled_step",
    "emit",
    "interleave",
    "keep_memory",
    "median",
    "ratios",
    "show",
    "training",
]


def keep_memory() -> None:
    """Lets glibc keep what XLA:CPU frees, as the allocators of accelerators do.

    Otherwise the temporaries of each step come back from the system as fresh pages, and faulting
    them in can cost more than the step's own use of them. Elsewhere it does nothing.
    """
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        # Other arenas than the first hold no buffers of 64 MB and more.
        mallopt(arena_max, 1)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**29)


def ratios(of: Sequence[float], over: Sequence[float], scale: float = 1.0) -> Estimate:
    """The median over rounds of the ratio within a round, times ``scale``."""
    return median([scale * a / b for a, b in zip(of, over, strict=True)])


def training(step: Callable[..., Any], state: Any, *batch: Any, steps: int = 1) -> Callable:
    """A run that takes ``steps`` training steps and remembers where it got to.

    Args:
        step: ``(state, *batch) -> state``, compiled; may take its state's buffers over.
        state: Where to start.
        *batch: The same at each step.
        steps: Steps per call.
    """

    def run():
        nonlocal state
        for _ in range(steps):
            state = step(state, *batch)
        return state

    return run


def compiled_step(step: Callable[..., Any], state: Any, *batch: Any) -> Any:
    """Compiles ``step(state, *batch)``, which may take its state's buffers over."""
    return jax.jit(step, donate_argnums=0).lower(state, *batch).compile()


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table for people."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)


def emit(figures: Mapping[str, Any]) -> None:
    """Prints figures as one line of JSON; an estimate as ``[median, low, high]``."""
    rounded = {
        k: [float(f"{x:.4g}") for x in v] if isinstance(v, Estimate) else v
        for k, v in figures.items()
    }
    print(json.dumps(rounded))
