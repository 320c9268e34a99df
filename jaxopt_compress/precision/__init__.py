"""Fewer bits in training: of activations, of optimizer states, and of parameters."""

from jaxopt_compress.precision.loss_scale import (
    LossScaleState,
    dynamic_loss_scale,
    loss_scale,
)
from jaxopt_compress.precision.mixed import mixed_precision
from jaxopt_compress.precision.small_states import SmallStates, small_states
from jaxopt_compress.precision.stochastic import stochastic_rounding

__all__ = [
    "LossScaleState",
    "SmallStates",
    "dynamic_loss_scale",
    "loss_scale",
    "mixed_precision",
    "small_states",
    "stochastic_rounding",
]
