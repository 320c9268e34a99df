"""Compressed arrays seen from another side: transposed, cut, reshaped, scaled."""

from jaxopt_compress.lift.views.base import (
    Cut,
    NoView,
    cast,
    cut,
    flipped,
    matching_runs,
    rescaled,
    reshaped,
    scaled,
    stacked,
    transposed,
)
from jaxopt_compress.lift.views.codebook import plain_codes
from jaxopt_compress.lift.views.joined import Joined
from jaxopt_compress.lift.views.quantized import entrywise, plain_steps
from jaxopt_compress.lift.views.rules import STORED

__all__ = [
    "STORED",
    "Cut",
    "Joined",
    "NoView",
    "cast",
    "cut",
    "entrywise",
    "flipped",
    "matching_runs",
    "plain_codes",
    "plain_steps",
    "rescaled",
    "reshaped",
    "scaled",
    "stacked",
    "transposed",
]
