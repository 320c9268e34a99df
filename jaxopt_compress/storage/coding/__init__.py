"""Entropy-coded arrays of checkpoints."""

from jaxopt_compress.storage.coding.blocks import CODINGS, check_coding
from jaxopt_compress.storage.coding.files import check_sizes, coded_bytes, read, write

__all__ = ["CODINGS", "check_coding", "check_sizes", "coded_bytes", "read", "write"]
