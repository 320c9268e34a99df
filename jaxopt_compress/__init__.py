"""Model compression for JAX: pure functions over parameter trees, for any function."""

from jaxopt_compress import distillation
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
    UnfollowedWarning,
    UnmeasuredWarning,
    calibrate,
    capture,
    lift,
    measures,
    uses,
)
from jaxopt_compress.low_rank import low_rank
from jaxopt_compress.numerics import bounds
from jaxopt_compress.planning import allocate, bytes, read_recipe, report, sensitivities
from jaxopt_compress.post_training import compress_in_order
from jaxopt_compress.precision import (
    dynamic_loss_scale,
    loss_scale,
    mixed_precision,
    small_states,
    stochastic_rounding,
)
from jaxopt_compress.quantization import (
    activations,
    backward,
    dorefa,
    lsq,
    progressive,
    quantize,
    quantize_array,
)
from jaxopt_compress.removal import NotRemovable, find_groups, flops
from jaxopt_compress.rewriting import Rewrite, equalize, fold_norms
from jaxopt_compress.sparsity import (
    distributions,
    grow,
    hard_concrete,
    prune,
    schedules,
    scores,
    soft_threshold,
    variational_dropout,
)
from jaxopt_compress.storage import (
    CheckpointError,
    load,
    load_safetensors,
    register_flax_serialization,
    save,
)
from jaxopt_compress.transforms import compressed_training, proximal, weight_gradients
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
    "NotRemovable",
    "PermutedArray",
    "QuantizedArray",
    "Rewrite",
    "SparseArray",
    "UnfollowedWarning",
    "UnmeasuredWarning",
    "activations",
    "allocate",
    "backward",
    "best_of",
    "bounds",
    "bytes",
    "calibrate",
    "capture",
    "chain",
    "combine",
    "compare",
    "compress",
    "compress_in_order",
    "compressed_training",
    "distillation",
    "distributions",
    "dorefa",
    "dynamic_loss_scale",
    "equalize",
    "evaluate",
    "find_groups",
    "flops",
    "fold_norms",
    "grow",
    "hard_concrete",
    "lift",
    "load",
    "load_safetensors",
    "loss_scale",
    "low_rank",
    "lsq",
    "map_dense",
    "materialize",
    "measures",
    "metrics",
    "mixed_precision",
    "nbytes",
    "partition",
    "progressive",
    "proximal",
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
    "sensitivities",
    "shard",
<<<<<<< HEAD
    "small_states",
    "soft_threshold",
    "stochastic_rounding",
=======
    "soft_threshold",
>>>>>>> masks
    "uses",
    "variational_dropout",
    "weight_gradients",
]
