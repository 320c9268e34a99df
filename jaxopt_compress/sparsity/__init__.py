"""Fewer parameters: scores, schedules, growth and masks."""

from jaxopt_compress.sparsity import distributions, grow, schedules, scores
from jaxopt_compress.sparsity.prune import prune

__all__ = ["distributions", "grow", "prune", "schedules", "scores"]
