"""Fewer parameters: scores, schedules and masks."""

from jaxopt_compress.sparsity import schedules, scores
from jaxopt_compress.sparsity.prune import prune

__all__ = ["prune", "schedules", "scores"]
