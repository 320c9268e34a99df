"""Contractions that execute in compressed form: arrays in, arrays out."""

from jaxopt_compress.kernels.dots import scaled_dot, zero_product
from jaxopt_compress.kernels.forms import (
    differentiated_as,
    on_each_platform,
    row_count,
    varying_alike,
)
from jaxopt_compress.kernels.integer_dots import integer_dot
from jaxopt_compress.kernels.planar_dots import planar_dot
from jaxopt_compress.kernels.transposed_dots import trained_dot, transposed_dot

__all__ = [
    "differentiated_as",
    "integer_dot",
    "on_each_platform",
    "planar_dot",
    "row_count",
    "scaled_dot",
    "trained_dot",
    "transposed_dot",
    "varying_alike",
    "zero_product",
]
