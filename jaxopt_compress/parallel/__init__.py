"""Training on many devices: gradients averaged in fewer bytes, and states split as parameters."""

from jaxopt_compress.parallel.blockwise import blockwise
from jaxopt_compress.parallel.power_sgd import power_sgd
from jaxopt_compress.parallel.reduced_gradients import (
    ReducedState,
    reduced_gradients,
    reduced_specs,
)
from jaxopt_compress.parallel.reduction import Reduction
from jaxopt_compress.parallel.state_shardings import state_shardings
from jaxopt_compress.parallel.top_k import top_k

__all__ = [
    "ReducedState",
    "Reduction",
    "blockwise",
    "power_sgd",
    "reduced_gradients",
    "reduced_specs",
    "state_shardings",
    "top_k",
]
