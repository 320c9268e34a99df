"""Grids of matrices: one step, zero point and permission to differ from 0 per entry."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.numerics.codes import decode, round_to_grid
from jaxopt_compress.numerics.formats import Format


class Grid(NamedTuple):
    """The values that the entries of a matrix may take.

    Attributes:
        scale: Float32 steps of the shape of the matrix.
        zero: Integer zero points of that shape, or None.
        keep: Booleans of that shape, false where an entry has to be 0; or None.
    """

    scale: jax.Array
    zero: jax.Array | None = None
    keep: jax.Array | None = None

    def nearest(self, x: jax.Array, fmt: Format) -> jax.Array:
        """The nearest value of each entry."""
        return self.values(self.levels(x, fmt), fmt)

    def levels(self, x: jax.Array, fmt: Format) -> jax.Array:
        """The nearest levels, zero points still added; those of 0.0 where nothing is kept."""
        if self.keep is not None:
            x = jnp.where(self.keep, x, 0)
        return round_to_grid(x, self.scale, self.zero, fmt)[0]

    def values(self, levels: jax.Array, fmt: Format) -> jax.Array:
        """Levels as float32 values."""
        del fmt
        if self.zero is not None:
            levels = levels - self.zero.astype(jnp.float32)
        return decode(levels, self.scale, jnp.float32)


def per_entry(fn: Any, count: int) -> Any:
    """``fn`` mapped over ``count`` leading axes of all arrays of its arguments."""
    for _ in range(count):
        fn = jax.vmap(fn)
    return fn
