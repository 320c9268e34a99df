"""Quality, size and speed of trees of parameters on data."""

from jaxopt_compress.evaluation import corruptions, metrics
from jaxopt_compress.evaluation.compare import compare
from jaxopt_compress.evaluation.comparison import Comparison
from jaxopt_compress.evaluation.evaluate import evaluate

__all__ = ["Comparison", "compare", "corruptions", "evaluate", "metrics"]
