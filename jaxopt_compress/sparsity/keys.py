"""Random keys in states, as words: states are written by tools that know arrays of numbers only."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp


def impl_of(key: jax.Array) -> Any:
    """The kind of generator of a random key of either type; static."""
    return jax.random.key_impl(_typed(key))


def words_for(key: jax.Array, path: str) -> jax.Array:
    """The words of a key of a parameter's own."""
    return jax.random.key_data(jax.random.fold_in(_typed(key), zlib.crc32(path.encode())))


def key_of(words: jax.Array, impl: Any) -> jax.Array:
    """The key that words stand for."""
    return jax.random.wrap_key_data(words, impl=impl)


def renewed(words: jax.Array, impl: Any) -> jax.Array:
    """The words of another key."""
    return jax.random.key_data(jax.random.split(key_of(words, impl), 1)[0])


def _typed(key: jax.Array) -> jax.Array:
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if is_typed else jax.random.wrap_key_data(key)
