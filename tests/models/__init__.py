"""Small models of every kind, with hand-written answers about how they use their parameters."""

from . import control_flow, convolutions, linen, nnx, others, plain, transforms
from .case import Case, Expected, leaves_by_path

__all__ = ["CASES", "Case", "Expected", "leaves_by_path"]

CASES = [
    *linen.CASES,
    *nnx.CASES,
    *others.CASES,
    *plain.CASES,
    *convolutions.CASES,
    *control_flow.CASES,
    *transforms.CASES,
]
