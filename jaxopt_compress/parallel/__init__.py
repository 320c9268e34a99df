"""Training on many devices: gradients that cost fewer bytes to average."""

from jaxopt_compress.parallel.blockwise import blockwise
from jaxopt_compress.parallel.power_sgd import power_sgd
from jaxopt_compress.parallel.reduced_gradients import (
    ReducedState,
    reduced_gradients,
    reduced_specs,
)
from jaxopt_compress.parallel.reduction import Reduction
from jaxopt_compress.parallel.top_k import top_k

__all__ = [
    "ReducedState",
    "Reduction",
    "blockwise",
    "power_sgd",
    "reduced_gradients",
    "reduced_specs",
    "top_k",
]
