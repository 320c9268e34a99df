"""Bits that an entropy coder needs for codes, as a smooth function of what is rounded to them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# By trial: how soon a value counts as not 0, the bits of a sign and of ending a size, and those of
# a doubled size.
_ROUNDING, _SIGN, _SIZE = 0.7, 1.5, 1.2


def code_cost(there: jax.Array, axes: Sequence[int]) -> jax.Array:
    """What a code that is not 0 costs more than a zero, beside the bits of its size.

    Args:
        there: Booleans, true where a code is not 0.
        axes: Negative axes over which they are counted.

    Returns:
        Float32 bits, of size 1 along ``axes``, at least those of a sign.
    """
    counted = jnp.sum(there, tuple(axes), keepdims=True, dtype=jnp.float32)
    every = jnp.float32(there.size / max(counted.size, 1))
    return jnp.maximum(jnp.log2((every - counted + 0.5) / (counted + 0.5)), 0) + _SIGN


def expected_bits(ratio: jax.Array, cost: jax.Array) -> jax.Array:
    """Bits of each entry.

    Args:
        ratio: Magnitudes over steps, any shape.
        cost: What `code_cost` found; broadcasts against ``ratio``.

    Returns:
        Float32, of the shape of ``ratio``: 0 costs what its share among codes says.

    Example:
        >>> import jax.numpy as jnp
        >>> codes = jnp.array([3.0] + [0.0] * 63)
        >>> bits = expected_bits(codes, code_cost(codes != 0, (-1,)))
        >>> [round(float(b), 1) for b in (bits[0], bits[1:].sum())]
        [9.2, 2.1]
    """
    # The cost says the share of codes that are not 0.
    base = jnp.log2(1 + jnp.exp2(_SIGN - cost))
    return cost * (1 - jnp.exp(-ratio / _ROUNDING)) + _SIZE * jnp.log2(1 + ratio) + base
