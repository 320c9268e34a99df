"""One transformation that runs any JAX function on compressed arguments, and what it can see."""

from jaxopt_compress.lift import (
    contractions,
    control_flow,
    convolutions,
    custom_rules,
    input_products,
    lookups,
    rotated_inputs,
    scaled_inputs,
    sums,
    tensor_train,
    tucker,
    views,
)
from jaxopt_compress.lift.interpreter import FallbackError, FallbackWarning
from jaxopt_compress.lift.lift import lift
from jaxopt_compress.lift.observe import measures
from jaxopt_compress.lift.observe.calibrate import UnmeasuredWarning, calibrate
from jaxopt_compress.lift.observe.capture import capture
from jaxopt_compress.lift.observe.statistics import Statistics, Stats, statistics_for
from jaxopt_compress.lift.observe.uses import (
    UnfollowedWarning,
    Use,
    Uses,
    layout_of,
    uses,
    uses_by_layout,
)

__all__ = [
    "FallbackError",
    "FallbackWarning",
    "Statistics",
    "Stats",
    "UnfollowedWarning",
    "UnmeasuredWarning",
    "Use",
    "Uses",
    "calibrate",
    "capture",
    "layout_of",
    "lift",
    "measures",
    "statistics_for",
    "uses",
    "uses_by_layout",
]

# Imported for the rules that they register.
del contractions, control_flow, convolutions, custom_rules, input_products, lookups
del rotated_inputs, scaled_inputs, sums, tensor_train, tucker, views
