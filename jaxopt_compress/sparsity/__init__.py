"""Fewer parameters: scores, schedules and masks."""

from jaxopt_compress.sparsity import schedules, scores
from jaxopt_compress.sparsity.prune import prune
from jaxopt_compress.sparsity.sparse_gpt import sparse_gpt

__all__ = ["prune", "schedules", "scores", "sparse_gpt"]
