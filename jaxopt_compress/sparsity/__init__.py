"""Fewer parameters."""

from jaxopt_compress.sparsity.prune import magnitude, prune
from jaxopt_compress.sparsity.schedules import Schedule, constant, polynomial

__all__ = ["Schedule", "constant", "magnitude", "polynomial", "prune"]
