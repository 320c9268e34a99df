"""Which indices of parameters go together, and functions without some of them."""

from jaxopt_compress.rewriting.coupling import (  # noqa: F401 (they register their rules)
    background_control,
    background_lookups,
    background_products,
    control,
    derivatives,
    elementwise,
    lookups,
    manual,
    products,
    shapes,
)
