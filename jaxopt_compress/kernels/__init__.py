"""Contractions that execute in compressed form: arrays in, arrays out."""

from jaxopt_compress.kernels.dots import planar_dot, scaled_dot

__all__ = ["planar_dot", "scaled_dot"]
