"""Optax transformations."""

from jaxopt_compress.transforms import proximal
from jaxopt_compress.transforms.gradients import weight_gradients
from jaxopt_compress.transforms.scalars import scalars
from jaxopt_compress.transforms.training import compressed_training

__all__ = ["compressed_training", "proximal", "scalars", "weight_gradients"]
