"""Floats of few bits: rounding to them, their bit patterns, and back, as elementwise arithmetic."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.numerics.integers import stochastic


class Minifloat(NamedTuple):
    """Sign, exponent and mantissa; no infinities are ever produced.

    A pattern with exponent field 0 is ``mantissa * 2**(1 - bias - mantissa_bits)``, others are
    ``(1 + mantissa / 2**mantissa_bits) * 2**(exponent - bias)``. Without mantissa bits the values
    are powers of two, and zero.

    Attributes:
        exponent_bits: Bits of the exponent.
        mantissa_bits: Bits of the mantissa.
        high: The largest finite value.
    """

    exponent_bits: int
    mantissa_bits: int
    high: float

    @property
    def low(self) -> float:
        """The lowest value."""
        return -self.high

    @property
    def signed(self) -> bool:
        """Whether codes are signed integers; they are bit patterns."""
        return False

    @property
    def bias(self) -> int:
        """What the exponent field is too large by."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def least(self) -> float:
        """The smallest positive value (with no mantissa: the smallest power of two)."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    def round(self, x: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """The nearest value, ties to the even mantissa; beyond the largest one, the largest.

        Args:
            x: Float32, any shape.
            noise: Uniform in [0, 1) of the same shape: rounds up with the probability that keeps
                the expected value. None rounds to the nearest.
        """
        # The distance of neighbours is a power of two, so these products and quotients are exact.
        exponents = lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000
        binade = lax.bitcast_convert_type(exponents, jnp.float32)
        if self.mantissa_bits:
            step = jnp.maximum(binade * 2.0**-self.mantissa_bits, self.least)
            level = x / step
            level = jnp.round(level) if noise is None else stochastic(level, noise)
            return jnp.clip(level * step, self.low, self.high)
        # Powers of two lie one binade apart; below the smallest one the neighbour is zero.
        step = jnp.maximum(binade, self.least)
        level = jnp.abs(x) / step
        level = jnp.round(level) if noise is None else stochastic(level, noise)
        return jnp.clip(jnp.copysign(level * step, x), self.low, self.high)

    def encode(self, values: jax.Array) -> jax.Array:
        """The bit patterns, uint8, of float32 values that `round` returned."""
        bits = lax.bitcast_convert_type(values, jnp.int32)
        magnitude = jnp.abs(values)
        normal = (bits & 0x7FFFFFFF) - ((127 - self.bias) << 23)
        normal = normal >> (23 - self.mantissa_bits)
        subnormal = (magnitude / self.least).astype(jnp.int32)
        smallest_normal = 2.0 ** (1 - self.bias)
        code = jnp.where(magnitude < smallest_normal, subnormal, normal)
        # Zero has one code, so that equal views have equal codes.
        sign = (values < 0).astype(jnp.int32) << (self.exponent_bits + self.mantissa_bits)
        return (code | sign).astype(jnp.uint8)

    def decode(self, codes: jax.Array) -> jax.Array:
        """The float32 values of bit patterns."""
        codes = codes.astype(jnp.int32)
        width = self.exponent_bits + self.mantissa_bits
        rest = codes & ((1 << width) - 1)
        normal = (rest << (23 - self.mantissa_bits)) + ((127 - self.bias) << 23)
        magnitude = lax.bitcast_convert_type(normal, jnp.float32)
        # Not by a float32 subnormal, which accelerators flush to zero.
        small = rest.astype(jnp.float32) * self.least
        magnitude = jnp.where(rest < (1 << self.mantissa_bits), small, magnitude)
        return jnp.where((codes >> width) & 1 == 1, -magnitude, magnitude)
