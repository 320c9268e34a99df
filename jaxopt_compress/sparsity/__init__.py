"""Fewer parameters: scores, schedules, growth and masks, and sparsity that training learns."""

from jaxopt_compress.sparsity import distributions, grow, schedules, scores
from jaxopt_compress.sparsity.hard_concrete import hard_concrete
from jaxopt_compress.sparsity.prune import prune
from jaxopt_compress.sparsity.reconstruct import reconstruct
from jaxopt_compress.sparsity.soft_threshold import soft_threshold
from jaxopt_compress.sparsity.sparse_gpt import sparse_gpt
from jaxopt_compress.sparsity.variational_dropout import variational_dropout

__all__ = [
    "distributions",
    "grow",
    "hard_concrete",
    "prune",
    "reconstruct",
    "schedules",
    "scores",
    "soft_threshold",
    "sparse_gpt",
    "variational_dropout",
]
