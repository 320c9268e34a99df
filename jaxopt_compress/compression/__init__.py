"""What a compression is, how several compose, and the step to the stored form."""

from jaxopt_compress.compression.base import (
    ChainState,
    Compression,
    CompressionState,
    LeafState,
    TrainingState,
)
from jaxopt_compress.compression.chain import chain
from jaxopt_compress.compression.checks import NeedsStats, NeedsValues
from jaxopt_compress.compression.compress import as_compression, compress
from jaxopt_compress.compression.leafwise import Decision, LeafMethod, Parameter, leafwise

__all__ = [
    "ChainState",
    "Compression",
    "CompressionState",
    "Decision",
    "LeafMethod",
    "LeafState",
    "NeedsStats",
    "NeedsValues",
    "Parameter",
    "TrainingState",
    "as_compression",
    "chain",
    "compress",
    "leafwise",
]
