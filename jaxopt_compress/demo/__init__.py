"""The main job on real data: a small network trained, compressed in five ways, and compared."""

from jaxopt_compress.demo.experiment import run
from jaxopt_compress.demo.training import Epochs

__all__ = ["Epochs", "run"]
