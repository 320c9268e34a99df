"""Interleaved timing, with intervals that need no assumption on how times are distributed."""

import ctypes
import gc
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table


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


class Samples(NamedTuple):
    """Seconds per round: of the clock, and of processor time over all threads."""

    wall: list[float]
    cpu: list[float]


class Estimate(NamedTuple):
    """A median and the interval that covers the true one at the confidence asked for."""

    median: float
    low: float
    high: float

    def __str__(self):
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interleave(
    runs: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2, seed: int = 0
) -> dict[str, Samples]:
    """Times every run once a round, in a new random order each round.

    What disturbs a machine for longer than a round then disturbs all runs alike, and cancels in the
    ratios of a round. Garbage is collected between rounds: a full collection, which takes as long
    as tracing a quarter of a large model, would land on whichever run happens to come then.

    Args:
        runs: Name -> what to time; the arrays that it returns are waited for.
        rounds: How often each one is timed.
        warmup: Untimed rounds before, which compile.
        seed: Of the orders.
    """
    order, shuffle = list(runs), random.Random(seed).shuffle
    samples = {name: Samples([], []) for name in runs}
    gc.disable()
    try:
        for i in range(warmup + rounds):
            shuffle(order)
            for name in order:
                wall, cpu = time.perf_counter(), time.process_time()
                jax.block_until_ready(runs[name]())
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                if i >= warmup:
                    samples[name].wall.append(wall)
                    samples[name].cpu.append(cpu)
            gc.collect()
    finally:
        gc.enable()
    return samples


def median(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The median, between the order statistics that bracket it at the confidence asked for.

    The number of values below the true median is binomial with probability one half, whatever
    their distribution: the k-th from either end bracket it unless fewer than k lie beyond.
    """
    ordered, n = sorted(values), len(values)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    k, beyond = 0, 2.0**-n
    while beyond <= (1 - confidence) / 2:
        k += 1
        beyond += math.comb(n, k) * 2.0**-n
    k = max(k, 1)
    return Estimate(middle, ordered[k - 1], ordered[n - k])


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
