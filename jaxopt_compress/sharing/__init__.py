"""Values that entries share, and training for what an entropy coder makes of a file."""

from jaxopt_compress.sharing.rate_distortion import rate_distortion
from jaxopt_compress.sharing.share import share
from jaxopt_compress.sharing.soft_share import soft_share

__all__ = ["rate_distortion", "share", "soft_share"]
