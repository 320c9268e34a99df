"""Transformations of several parameters together, or of the function itself."""

from jaxopt_compress.rewriting.base import Rewrite
from jaxopt_compress.rewriting.equalize import Equalized, equalize
from jaxopt_compress.rewriting.fold_scales import FoldedScales, fold_scales
from jaxopt_compress.rewriting.norms import FoldedNorms, fold_norms
from jaxopt_compress.rewriting.report import Difference
from jaxopt_compress.rewriting.rotate import Rotated, rotate
from jaxopt_compress.rewriting.rotate_inputs import RotatedInputs, rotate_inputs
from jaxopt_compress.rewriting.smooth import smooth

__all__ = [
    "Difference",
    "Equalized",
    "FoldedNorms",
    "FoldedScales",
    "Rewrite",
    "Rotated",
    "RotatedInputs",
    "equalize",
    "fold_norms",
    "fold_scales",
    "rotate",
    "rotate_inputs",
    "smooth",
]
