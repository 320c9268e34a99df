"""Paths and selection, partition and combine, sizes, and the roles of axes."""

from jaxopt_compress.tree.budgets import Bytes, Flops, Traffic
from jaxopt_compress.tree.globs import Glob
from jaxopt_compress.tree.layout import AssumedLayout, Layout, assume_layout
from jaxopt_compress.tree.mismatches import kind_of
from jaxopt_compress.tree.partition import combine, nbytes, partition, resident_bytes, shard
from jaxopt_compress.tree.paths import (
    Fit,
    NoLeaf,
    Part,
    Where,
    fit_of,
    fits,
    map_named,
    may_miss,
    named_leaves,
    path_of,
    select,
    warn_of_vectors,
)

__all__ = [
    "AssumedLayout",
    "Bytes",
    "Fit",
    "Flops",
    "Glob",
    "Layout",
    "NoLeaf",
    "Part",
    "Traffic",
    "Where",
    "assume_layout",
    "combine",
    "fit_of",
    "fits",
    "kind_of",
    "map_named",
    "may_miss",
    "named_leaves",
    "nbytes",
    "partition",
    "path_of",
    "resident_bytes",
    "select",
    "shard",
    "warn_of_vectors",
]
