"""The five ways to compress."""

from collections.abc import Callable
from typing import NamedTuple

import jaxopt_compress as jc
from jaxopt_compress.sparsity.schedule import Schedule

SPARSITY = 0.9
RANK = 8

KERNELS = "**/kernel"
# The first and the last layer hold one percent of the weights, and most of the sensitivity.
LARGE = ["**/conv2/kernel", "**/hidden/kernel"]


class Method(NamedTuple):
    """One way to compress.

    Attributes:
        name: In the table.
        key: In file names.
        make: From a schedule of sparsity, which only pruning needs, to the compression.
    """

    name: str
    key: str
    make: Callable[[Schedule], jc.Compression]


def _prune(schedule: Schedule) -> jc.Compression:
    return jc.prune(jc.scores.magnitude(), schedule, where=LARGE)


def _low_rank(schedule: Schedule) -> jc.Compression:
    del schedule
    return jc.low_rank(rank=RANK, where=LARGE)


def _int8(before: Callable[[Schedule], jc.Compression]) -> Callable[[Schedule], jc.Compression]:
    return lambda schedule: jc.chain(before(schedule), jc.quantize("int8", where=KERNELS))


METHODS = (
    Method(f"prune {SPARSITY:.0%}", "prune", _prune),
    Method("QAT int4", "int4", lambda _: jc.quantize("int4", where=KERNELS)),
    Method(f"SVD rank {RANK}", "svd", _low_rank),
    Method("prune + int8", "prune_int8", _int8(_prune)),
    Method("SVD + int8", "svd_int8", _int8(_low_rank)),
)


def gradual(steps: int) -> Schedule:
    """Sparsity that rises over the first half of training, renewed every few steps."""
    return jc.schedules.polynomial(SPARSITY, begin=0, end=max(1, steps // 2), every=5)


def at_once() -> Schedule:
    """The final sparsity from the start, for compressing without training."""
    return jc.schedules.constant(SPARSITY)
