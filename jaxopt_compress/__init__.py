"""Model compression for JAX: pure functions over parameter trees, for any function."""

from jaxopt_compress.arrays import (
    InputQuantizedArray,
    LowRankArray,
    QuantizedArray,
    SparseArray,
    materialize,
)
from jaxopt_compress.compression import Compression, best_of, chain, compress
from jaxopt_compress.evaluation import compare, evaluate, metrics
from jaxopt_compress.lift import (
    FallbackError,
    FallbackWarning,
    calibrate,
    capture,
    lift,
    measures,
    uses,
)
from jaxopt_compress.low_rank import low_rank
from jaxopt_compress.numerics import bounds
from jaxopt_compress.planning import report
from jaxopt_compress.post_training import compress_in_order
from jaxopt_compress.quantization import (
    activations,
    backward,
    dorefa,
    lsq,
    progressive,
    quantize,
    quantize_array,
)
from jaxopt_compress.rewriting import Rewrite, equalize, fold_norms
from jaxopt_compress.sparsity import prune, schedules, scores
from jaxopt_compress.storage import load, save
from jaxopt_compress.transforms import compressed_training, weight_gradients
from jaxopt_compress.tree import AssumedLayout, combine, nbytes, partition, resident_bytes, shard

__all__ = [
    "AssumedLayout",
    "Compression",
    "FallbackError",
    "FallbackWarning",
    "InputQuantizedArray",
    "LowRankArray",
    "QuantizedArray",
    "Rewrite",
    "SparseArray",
    "activations",
    "backward",
    "best_of",
    "bounds",
    "calibrate",
    "capture",
    "chain",
    "combine",
    "compare",
    "compress",
    "compress_in_order",
    "compressed_training",
    "dorefa",
    "equalize",
    "evaluate",
    "fold_norms",
    "lift",
    "load",
    "low_rank",
    "lsq",
    "materialize",
    "measures",
    "metrics",
    "nbytes",
    "partition",
    "progressive",
    "prune",
    "quantize",
    "quantize_array",
    "report",
    "resident_bytes",
    "save",
    "schedules",
    "scores",
    "shard",
    "uses",
    "weight_gradients",
]
