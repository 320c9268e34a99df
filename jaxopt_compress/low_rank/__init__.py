"""Thin factors in the place of matrices."""

from jaxopt_compress.low_rank.low_rank import low_rank

__all__ = ["low_rank"]
