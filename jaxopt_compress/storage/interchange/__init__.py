"""Files of other libraries: safetensors with quantized weights, and GGUF."""

from jaxopt_compress.storage.interchange.gguf import load_gguf, save_gguf
from jaxopt_compress.storage.interchange.safetensors import save_safetensors

__all__ = ["load_gguf", "save_gguf", "save_safetensors"]
