"""What the fields of compressed arrays are made of: dtypes, axes, partition specs."""

from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxopt_compress.typing import Leaf


class Packing(NamedTuple):
    """How uint8 words hold codes, in the layout of `numerics.packing`.

    Attributes:
        bits: Bits per code, 1 to 7.
        axis: The negative axis along which codes are packed.
        block: Codes per block. One bit per code in blocks of 8 is the order of `pack_mask`.
        columns: Codes in a row of the dense array, where the shape of the words does not say it.
    """

    bits: int
    axis: int
    block: int
    columns: int | None = None


class Distances(NamedTuple):
    """How integers say which entries of rows are kept: by what each leaves out before it.

    Attributes:
        size: Entries in a row.
        columns: Entries in a row of the dense array, several of which may make a row here.
    """

    size: int
    columns: int


def bits_of(dtype: DTypeLike) -> int:
    """Bits per entry that a dtype really needs."""
    dtype = jnp.dtype(dtype)
    if dtype == np.dtype(bool):
        return 1
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return 8 * dtype.itemsize


def is_traced(x: Leaf) -> bool:
    """Whether ``x`` has no values yet, being an argument of a function that is traced."""
    return isinstance(x, Tracer)


def is_key(x: Leaf) -> TypeGuard[jax.Array]:
    """Whether a leaf is a random key with a type of its own."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def check_axis(axis: object, rank: int, absent: bool = False) -> None:
    """Raises ValueError unless ``axis`` is a negative axis, or None where it may be absent."""
    if not (absent and axis is None) and not (type(axis) is int and -rank <= axis < 0):
        raise ValueError(f"axis {axis!r} of an array of rank {rank}")


def check_length(name: str, length: object) -> None:
    """Raises ValueError unless ``length`` is a whole number of entries."""
    if type(length) is not int or length < 1:
        raise ValueError(f"{name}={length!r}")


def pad_spec(spec: PartitionSpec, ndim: int) -> tuple[Any, ...]:
    """The entries of ``spec``, filled up with None to ``ndim``.

    Raises:
        ValueError: ``spec`` has more entries than the array has axes.
    """
    if len(spec) > ndim:
        raise ValueError(f"{spec} has {len(spec)} entries for an array of rank {ndim}")
    return (*spec, *(None,) * (ndim - len(spec)))


def narrow_spec(entries: tuple[Any, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """The spec of an array that has size 1 where the dense array is split."""
    return PartitionSpec(*(None if n == 1 else e for e, n in zip(entries, shape, strict=True)))
