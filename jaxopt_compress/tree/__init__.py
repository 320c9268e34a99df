"""Paths and selection, partition and combine, sizes, and the roles of axes."""

from jaxopt_compress.tree.layout import AssumedLayout, Layout, assume_layout
from jaxopt_compress.tree.partition import combine, nbytes, partition, resident_bytes, shard
from jaxopt_compress.tree.paths import Part, Where, map_named, named_leaves, path_of, select

__all__ = [
    "AssumedLayout",
    "Layout",
    "Part",
    "Where",
    "assume_layout",
    "combine",
    "map_named",
    "named_leaves",
    "nbytes",
    "partition",
    "path_of",
    "resident_bytes",
    "select",
    "shard",
]
