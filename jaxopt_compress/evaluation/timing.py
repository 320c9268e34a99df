"""Interleaved timing, with intervals that need no assumption on how times are distributed."""

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax

from jaxopt_compress.typing import PyTree


class Samples(NamedTuple):
    """Seconds per round: of the clock, and of processor time over all threads."""

    wall: list[float]
    cpu: list[float]


class Estimate(NamedTuple):
    """A median and the interval that covers the true one at the confidence asked for."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interleave(
    runs: Mapping[str, Callable[[], PyTree]], rounds: int, warmup: int = 2, seed: int = 0
) -> dict[str, Samples]:
    """Times every run once a round, in a new random order each round.

    What disturbs a machine for longer than a round then disturbs all runs alike, and cancels in the
    ratios of a round. Garbage is collected between rounds: a full collection, which takes as long
    as tracing a quarter of a large model, would land on whichever run happens to come then.

    Args:
        runs: Name -> what to time; the arrays that it returns are waited for.
        rounds: How often each one is timed.
        warmup: Untimed rounds before, which compile.
        seed: The seed of the orders.
    """
    order, shuffle = list(runs), random.Random(seed).shuffle
    samples = {name: Samples([], []) for name in runs}
    collects = gc.isenabled()
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
        if collects:
            gc.enable()
    return samples


def median(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The median, between the order statistics that bracket it at the confidence asked for.

    The number of values below the true median is binomial with probability one half, whatever
    their distribution: the k-th from either end bracket it unless fewer than k lie beyond. Five
    values and fewer cannot reach 95%: their interval is their range.

    Example:
        >>> median([5.0, 1.0, 3.0, 2.0, 4.0, 6.0, 7.0, 8.0, 9.0])
        Estimate(median=5.0, low=2.0, high=8.0)
    """
    ordered, n = sorted(values), len(values)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    k, beyond = 0, 2.0**-n
    while beyond <= (1 - confidence) / 2:
        k += 1
        beyond += math.comb(n, k) * 2.0**-n
    k = max(k, 1)
    return Estimate(middle, ordered[k - 1], ordered[n - k])
