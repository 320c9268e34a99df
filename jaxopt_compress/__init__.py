"""Model compression for JAX: pure functions over parameter trees, for any function."""

from jaxopt_compress.arrays import LowRankArray, QuantizedArray, SparseArray, materialize
from jaxopt_compress.compression import Compression, chain, compress
from jaxopt_compress.lift import FallbackError, FallbackWarning, lift, uses
from jaxopt_compress.low_rank import low_rank
from jaxopt_compress.quantization import quantize
from jaxopt_compress.sparsity import constant, magnitude, polynomial, prune
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
    "chain",
    "combine",
    "compress",
    "compressed_training",
    "constant",
    "lift",
    "low_rank",
    "magnitude",
    "materialize",
    "nbytes",
    "partition",
    "polynomial",
    "prune",
    "quantize",
    "resident_bytes",
    "shard",
    "uses",
]
