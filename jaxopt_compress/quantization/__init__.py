"""Fewer bits per parameter."""

from jaxopt_compress.quantization.activations import activations, backward
from jaxopt_compress.quantization.arrays import quantize_array
from jaxopt_compress.quantization.auto_round import auto_round
from jaxopt_compress.quantization.awq import awq
from jaxopt_compress.quantization.dorefa import dorefa
from jaxopt_compress.quantization.gptq import gptq
from jaxopt_compress.quantization.hqq import hqq
from jaxopt_compress.quantization.lsq import lsq
from jaxopt_compress.quantization.progressive import progressive
from jaxopt_compress.quantization.quantize import quantize
from jaxopt_compress.quantization.smooth_quant import smooth_quant

__all__ = [
    "activations",
    "auto_round",
    "awq",
    "backward",
    "dorefa",
    "gptq",
    "hqq",
    "lsq",
    "progressive",
    "quantize",
    "quantize_array",
    "smooth_quant",
]
