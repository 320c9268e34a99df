"""Levels that follow no formula: a table of them, read without a lookup."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Codebook(NamedTuple):
    """Ascending levels, the code of each being its position.

    Attributes:
        levels: The values, exact in float32.
    """

    levels: tuple[float, ...]

    @property
    def low(self) -> float:
        """The lowest level."""
        return self.levels[0]

    @property
    def high(self) -> float:
        """The highest level."""
        return self.levels[-1]

    @property
    def signed(self) -> bool:
        """Whether codes are signed integers; they are positions."""
        return False

    def round(self, x: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """The nearest level, the lower one halfway between two.

        Args:
            x: Float32, any shape.
            noise: Uniform in [0, 1) of the same shape: takes the level above with the probability
                that keeps the expected value. None takes the nearest one.
        """
        values = np.asarray(self.levels, np.float32)
        level = jnp.full(x.shape, values[0])
        for below, above in itertools.pairwise(values):
            bound = (below + above) / 2 if noise is None else below + noise * (above - below)
            # That bound may be rounded up to the level itself, which stays as it is.
            level = jnp.where((x > bound) | (x >= above), above, level)
        return jnp.where(jnp.isnan(x), x, level)

    def encode(self, values: jax.Array) -> jax.Array:
        """The uint8 positions of levels that `round` returned."""
        code = jnp.zeros(values.shape, jnp.uint8)
        for level in np.asarray(self.levels[1:], np.float32):
            code = code + (values >= level).astype(jnp.uint8)
        return code

    def decode(self, codes: jax.Array) -> jax.Array:
        """The float32 levels of positions: a tree of selections, one bit of the code per storey.

        A lookup would be a gather, which compilers for accelerators spell out in memory.
        """
        codes = codes.astype(jnp.int32)
        storey = [jnp.float32(x) for x in self.levels]
        bit = 0
        while len(storey) > 1:
            odd = (codes >> bit) & 1 == 1
            pairs = [storey[i : i + 2] for i in range(0, len(storey), 2)]
            storey = [jnp.where(odd, p[-1], p[0]) for p in pairs]
            bit += 1
        return jnp.broadcast_to(storey[0], codes.shape)


# Dettmers et al., 2023, QLoRA: Efficient Finetuning of Quantized LLMs, appendix E.
NF4 = Codebook(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)

# Rastegari et al., 2016, XNOR-Net.
BINARY = Codebook((-1.0, 1.0))


def odd_integers(bits: int) -> Codebook:
    """As many odd integers, symmetric to 0, as there are codes: a grid without a zero.

    References:
        Zhou et al., 2016, DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low
        Bitwidth Gradients.
    """
    return Codebook(tuple(2.0 * code + 1 - 2**bits for code in range(2**bits)))
