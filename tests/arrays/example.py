"""What an example of a compressed array is, and values for one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# The matrices among the examples.
K, N = 64, 8


class Example(NamedTuple):
    """A leaf and what it has to mean.

    Attributes:
        leaf: The compressed array.
        formula: Its dense array from its float fields, in the order of the tree, in plain jnp.
    """

    leaf: Any
    formula: Callable[..., jax.Array]


def normal(rng, *shape, dtype="float32"):
    """Normal values, some of them -0.0."""
    x = rng.normal(size=shape)
    x.reshape(-1)[::7] = -0.0
    return jnp.asarray(x, "float32").astype(dtype)


def float_fields(leaf):
    """The arrays within a leaf that gradients can move, in the order of the tree."""
    wide = lambda x: jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1
    return [x for x in jax.tree.leaves(leaf) if wide(x)]
