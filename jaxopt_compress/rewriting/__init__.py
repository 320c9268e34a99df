"""Transformations of several parameters together, or of the function itself."""

from jaxopt_compress.rewriting.base import Rewrite
from jaxopt_compress.rewriting.equalize import Equalized, equalize
from jaxopt_compress.rewriting.norms import FoldedNorms, fold_norms
from jaxopt_compress.rewriting.report import Difference

__all__ = ["Difference", "Equalized", "FoldedNorms", "Rewrite", "equalize", "fold_norms"]
