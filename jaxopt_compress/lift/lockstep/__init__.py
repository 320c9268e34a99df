"""One forward pass over many batches at once, in which parameters are decided on the way."""

from jaxopt_compress.lift.lockstep.march import Decide, WholeWarning, march

__all__ = ["Decide", "WholeWarning", "march"]
