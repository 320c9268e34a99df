"""Functions and compressed weights for machines that do not have this package."""

from jaxopt_compress.deployment.artifact import export
from jaxopt_compress.deployment.onnx_file import export_onnx

__all__ = ["export", "export_onnx"]
