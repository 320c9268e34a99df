"""Equally spaced levels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def stochastic(x: jax.Array, noise: jax.Array) -> jax.Array:
    """An integer next to each entry, the upper one where the noise lies below the part after it."""
    below = jnp.floor(x)
    # Not floor(x + noise), whose sum is rounded.
    return below + (noise < x - below).astype(x.dtype)


class Integers(NamedTuple):
    """All integers from ``low`` to ``high``.

    Attributes:
        low: The lowest level.
        high: The highest level.
    """

    low: int
    high: int

    @property
    def signed(self) -> bool:
        """Whether codes are signed integers."""
        return self.low < 0

    def round(self, x: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """The nearest integer, ties to even, as a float and not yet kept within bounds.

        Args:
            x: Float32, any shape.
            noise: Uniform in [0, 1) of the same shape: rounds up with the probability that keeps
                the expected value. None rounds to the nearest.
        """
        return jnp.round(x) if noise is None else stochastic(x, noise)

    def encode(self, values: jax.Array) -> jax.Array:
        """Float32 integers as integers."""
        return values.astype(jnp.int8 if -128 <= self.low and self.high <= 127 else jnp.int16)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Integers as float32."""
        return codes.astype(jnp.float32)
