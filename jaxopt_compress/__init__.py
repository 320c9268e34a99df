"""Model compression for JAX: pure functions over parameter trees, for any function."""

from jaxopt_compress.arrays import (
    InputQuantizedArray,
    LowRankArray,
    PermutedArray,
    QuantizedArray,
    SparseArray,
    map_dense,
    materialize,
)
from jaxopt_compress.compression import Compression, LargerWarning, best_of, chain, compress
from jaxopt_compress.evaluation import compare, evaluate, metrics
from jaxopt_compress.lift import (
    FallbackError,
    FallbackWarning,
    UnmeasuredWarning,
    calibrate,
    capture,
    lift,
    measures,
    uses,
)
from jaxopt_compress.low_rank import low_rank
from jaxopt_compress.numerics import bounds
from jaxopt_compress.planning import read_recipe, report
from jaxopt_compress.post_training import compress_in_order
from jaxopt_compress.quantization import (
    activations,
    auto_round,
    backward,
    dorefa,
    gptq,
    hqq,
    lsq,
    progressive,
    quantize,
    quantize_array,
)
from jaxopt_compress.rewriting import Rewrite, equalize, fold_norms
from jaxopt_compress.sparsity import prune, schedules, scores, sparse_gpt
from jaxopt_compress.storage import (
    CheckpointError,
    load,
    load_safetensors,
    register_flax_serialization,
    save,
)
from jaxopt_compress.transforms import compressed_training, weight_gradients
from jaxopt_compress.tree import (
    AssumedLayout,
    Glob,
    combine,
    nbytes,
    partition,
    resident_bytes,
    shard,
)

__all__ = [
    "AssumedLayout",
    "CheckpointError",
    "Compression",
    "FallbackError",
    "FallbackWarning",
    "Glob",
    "InputQuantizedArray",
    "LargerWarning",
    "LowRankArray",
    "PermutedArray",
    "QuantizedArray",
    "Rewrite",
    "SparseArray",
    "UnmeasuredWarning",
    "activations",
    "auto_round",
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
    "gptq",
    "hqq",
    "lift",
    "load",
    "load_safetensors",
    "low_rank",
    "lsq",
    "map_dense",
    "materialize",
    "measures",
    "metrics",
    "nbytes",
    "partition",
    "progressive",
    "prune",
    "quantize",
    "quantize_array",
    "read_recipe",
    "register_flax_serialization",
    "report",
    "resident_bytes",
    "save",
    "schedules",
    "scores",
    "shard",
    "sparse_gpt",
    "uses",
    "weight_gradients",
]
