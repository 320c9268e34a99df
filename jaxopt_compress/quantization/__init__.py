"""Fewer bits per parameter."""

from jaxopt_compress.quantization.quantize import fake_quantize, quantize

__all__ = ["fake_quantize", "quantize"]
