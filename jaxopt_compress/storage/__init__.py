"""On-disk forms."""

from jaxopt_compress.storage.checkpoint import load, load_shapes, save
from jaxopt_compress.storage.folder import CheckpointError
from jaxopt_compress.storage.readers import Source, open_checkpoint

__all__ = ["CheckpointError", "Source", "load", "load_shapes", "open_checkpoint", "save"]
