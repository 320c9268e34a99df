"""One transformation that runs any JAX function on compressed arguments, and what it can see."""

from jaxopt_compress.lift import contractions, control_flow, views
from jaxopt_compress.lift.interpreter import FallbackError, FallbackWarning
from jaxopt_compress.lift.lift import lift
from jaxopt_compress.lift.uses import Use, layout_of, uses

__all__ = ["FallbackError", "FallbackWarning", "Use", "layout_of", "lift", "uses"]

del contractions, control_flow, views  # imported for the rules they register
