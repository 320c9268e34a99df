"""Products that execute in compressed form: arrays in, arrays out."""

from jaxopt_compress.kernels.forms import (
    differentiated_as,
    on_each_platform,
    row_count,
    varying_alike,
)
from jaxopt_compress.kernels.matmul import FORMS, explain, matmul
from jaxopt_compress.kernels.operand import How, Operand, Stored
from jaxopt_compress.kernels.transposed_dots import trained_dot, transposed_dot

__all__ = [
    "FORMS",
    "How",
    "Operand",
    "Stored",
    "differentiated_as",
    "explain",
    "matmul",
    "on_each_platform",
    "row_count",
    "trained_dot",
    "transposed_dot",
    "varying_alike",
]
