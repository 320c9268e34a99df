"""Thin factors in the place of matrices, or beside them."""

from jaxopt_compress.low_rank.correction import low_rank_correction
from jaxopt_compress.low_rank.cp import cp
from jaxopt_compress.low_rank.kronecker import kronecker
from jaxopt_compress.low_rank.lora import lora
from jaxopt_compress.low_rank.low_rank import low_rank
from jaxopt_compress.low_rank.plus_sparse import low_rank_plus_sparse
from jaxopt_compress.low_rank.tensor_train import tensor_train
from jaxopt_compress.low_rank.tucker import tucker

__all__ = [
    "cp",
    "kronecker",
    "lora",
    "low_rank",
    "low_rank_correction",
    "low_rank_plus_sparse",
    "tensor_train",
    "tucker",
]
