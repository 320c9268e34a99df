"""Transformations of several parameters together, or of the function itself."""

from jaxopt_compress.rewriting.norms import FoldedNorms, fold_norms

__all__ = ["FoldedNorms", "fold_norms"]
