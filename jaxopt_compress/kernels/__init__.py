"""Contractions that execute in compressed form: arrays in, arrays out."""

from jaxopt_compress.kernels.dots import planar_dot, scaled_dot
from jaxopt_compress.kernels.integer_dots import integer_dot

__all__ = ["integer_dot", "planar_dot", "scaled_dot"]
