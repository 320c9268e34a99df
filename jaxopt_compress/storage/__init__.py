"""On-disk forms."""

from jaxopt_compress.storage.coding import coded_bytes
from jaxopt_compress.storage.flax_states import register_flax_serialization
from jaxopt_compress.storage.folder import CheckpointError, check_free
from jaxopt_compress.storage.interchange import load_gguf, save_gguf, save_safetensors
from jaxopt_compress.storage.loading import load, load_shapes
from jaxopt_compress.storage.readers import Source, load_safetensors, open_checkpoint
from jaxopt_compress.storage.saving import save, save_async

__all__ = [
    "CheckpointError",
    "Source",
    "check_free",
    "coded_bytes",
    "load",
    "load_gguf",
    "load_safetensors",
    "load_shapes",
    "open_checkpoint",
    "register_flax_serialization",
    "save",
    "save_async",
    "save_gguf",
    "save_safetensors",
]
