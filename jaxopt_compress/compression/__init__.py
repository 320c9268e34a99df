"""Compressions, how they compose, and the step to the stored form."""

from jaxopt_compress.compression.base import Compression
from jaxopt_compress.compression.best_of import best_of
from jaxopt_compress.compression.chain import chain
from jaxopt_compress.compression.checks import NeedsStats, NeedsValues
from jaxopt_compress.compression.compress import (
    Globs,
    LargerWarning,
    Recipe,
    as_compression,
    compress,
)
from jaxopt_compress.compression.leaf_states import LeafState
from jaxopt_compress.compression.method import (
    Decision,
    LeafMethod,
    Method,
    compression_of,
    each,
    made,
    spelled,
)
from jaxopt_compress.compression.parameter import Parameter
from jaxopt_compress.compression.states import ChainState, CompressionState, TrainingState

__all__ = [
    "ChainState",
    "Compression",
    "CompressionState",
    "Decision",
    "Globs",
    "LargerWarning",
    "LeafMethod",
    "LeafState",
    "Method",
    "NeedsStats",
    "NeedsValues",
    "Parameter",
    "Recipe",
    "TrainingState",
    "as_compression",
    "best_of",
    "chain",
    "compress",
    "compression_of",
    "each",
    "made",
    "spelled",
]
