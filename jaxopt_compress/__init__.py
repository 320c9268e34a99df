"""Model compression for JAX: pure functions over parameter trees, for any function."""

from jaxopt_compress.arrays import LowRankArray, QuantizedArray, SparseArray, materialize
from jaxopt_compress.compression import Compression, chain, compress
from jaxopt_compress.lift import FallbackError, FallbackWarning, calibrate, lift, uses
from jaxopt_compress.low_rank import low_rank
from jaxopt_compress.planning import report
from jaxopt_compress.quantization import quantize
from jaxopt_compress.sparsity import constant, magnitude, polynomial, prune
from jaxopt_compress.storage import load, save
from jaxopt_compress.transforms import compressed_training
from jaxopt_compress.tree import AssumedLayout, combine, nbytes, partition, resident_bytes, shard

__all__ = [
    "AssumedLayout",
    "Compression",
    "FallbackError",
    "FallbackWarning",
    "LowRankArray",
    "QuantizedArray",
    "SparseArray",
    "calibrate",
    "chain",
    "combine",
    "compress",
    "compressed_training",
    "constant",
    "lift",
    "load",
    "low_rank",
    "magnitude",
    "materialize",
    "nbytes",
    "partition",
    "polynomial",
    "prune",
    "quantize",
    "report",
    "resident_bytes",
    "save",
    "shard",
    "uses",
]
