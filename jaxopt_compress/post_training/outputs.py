"""What a function returns on batches, and how far that is from what it should."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from jaxopt_compress.tree.paths import is_float
from jaxopt_compress.typing import PyTree


def as_arguments(batches: Iterable[PyTree]) -> list[tuple[PyTree, ...]]:
    """Batches as tuples of arguments behind the parameters."""
    return [batch if isinstance(batch, tuple) else (batch,) for batch in batches]


def squares(got: PyTree, want: PyTree) -> jax.Array:
    """The summed squares of the differences of all floats, in float32."""
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    wide = lambda x: jnp.asarray(x, jnp.float32)
    gaps = [wide(a) - wide(b) for a, b in leaves if is_float(b)]
    return jnp.sum(jnp.stack([jnp.sum(jnp.square(gap)) for gap in gaps]))


def relative_squares(got: PyTree, want: PyTree) -> jax.Array:
    """`squares` over those of what is wanted."""
    whole = squares(want, jax.tree.map(jnp.zeros_like, want))
    return squares(got, want) / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)
