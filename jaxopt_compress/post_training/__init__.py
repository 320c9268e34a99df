"""Compressing trained models with data, but without training."""

from jaxopt_compress.post_training.in_order import compress_in_order

__all__ = ["compress_in_order"]
