"""Compressing trained models with data, but without training."""

from jaxopt_compress.post_training.bias_correction import CorrectedBiases, correct_biases
from jaxopt_compress.post_training.distill import distill
from jaxopt_compress.post_training.in_order import compress_in_order
from jaxopt_compress.post_training.learn_rounding import learn_rounding

__all__ = ["CorrectedBiases", "compress_in_order", "correct_biases", "distill", "learn_rounding"]
