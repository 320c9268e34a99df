"""The layout of codes in memory, and how a compiler for CPU reads them without a detour."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Code(NamedTuple):
    """How stored elements are read.

    Attributes:
      read: `(stored, field)` to codes, numbers of some type; they broadcast against each other.
      planes: fields of a stored element along K.
      across: fields of a stored element along N.
      decoded: whether reading takes more arithmetic than a conversion.
    """

    read: Callable[..., jax.Array]
    planes: int = 1
    across: int = 1
    decoded: bool = False


def readable(stored, bits=None):
    """The array to cut into blocks, and the `Code` in which it is written."""
    if bits is not None:
        return stored, Code(functools.partial(_field, bits=bits), planes=8 // bits)
    if (across := columns_per_byte(stored)) > 1:
        signed = jnp.issubdtype(stored.dtype, jnp.signedinteger)
        read = functools.partial(_field, bits=8 // across, signed=signed)
        return packed_columns(stored), Code(read, across=across)
    if stored.dtype.itemsize == 1 and jnp.issubdtype(stored.dtype, jnp.floating):
        # XLA would cut such floats as float16, and convert all of them there and back for it.
        read = lambda words, _: _float8(words, stored.dtype)
        return lax.bitcast_convert_type(stored, jnp.uint8), Code(read)
    return stored, Code(lambda codes, _: codes)


def columns_per_byte(codes):
    """How many neighbours along the last axis XLA packs into a byte; 1 if they do not fill it."""
    several = next((8 // b for b in (2, 4) if codes.dtype.name in (f"int{b}", f"uint{b}")), 1)
    return several if codes.shape[-1] % several == 0 else 1


def packed_columns(codes):
    """The bytes `[*, N / columns_per_byte]` in which XLA holds codes of 2 or 4 bits, as uint8."""
    shape = (*codes.shape[:-1], -1, columns_per_byte(codes))
    return lax.bitcast_convert_type(codes.reshape(shape), jnp.uint8)


def _field(words, at, bits, signed=True):
    """Bits `[at * bits, (at + 1) * bits)` of bytes: int32, or uint8 if unsigned."""
    if not signed:
        words, right = jnp.broadcast_arrays(words, jnp.asarray(at * bits, jnp.uint8))
        return lax.shift_right_logical(words, right) & np.uint8(2**bits - 1)
    words, left = jnp.broadcast_arrays(
        words.astype(jnp.int32), jnp.asarray(32 - bits - at * bits, jnp.int32)
    )
    return lax.shift_right_arithmetic(words << left, jnp.full_like(words, 32 - bits))


def _float8(words, dtype):
    """Floats of eight bits from their bytes; by way of float16, of which CPUs convert vectors."""
    if dtype == jnp.float8_e5m2:
        return lax.bitcast_convert_type(words.astype(jnp.uint16) << 8, jnp.float16)
    if dtype == jnp.float8_e4m3fn:
        # One bit less of exponent, the bias of which differs by 8.
        words = words.astype(jnp.uint16)
        half = lax.bitcast_convert_type((words & 0x80) << 8 | (words & 0x7F) << 7, jnp.float16)
        return jnp.where((words & 0x7F) == 0x7F, jnp.nan, half.astype(jnp.float32) * 256)
    return lax.bitcast_convert_type(words, dtype)
