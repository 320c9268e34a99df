"""What every compressed parameter is: a pytree node that stands for one dense array."""

import dataclasses
import math
from typing import Any, Self, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec


class CompressedArray:
    """A dense array in another form, as a frozen pytree dataclass.

    Children are arrays or again compressed arrays. Every array child keeps the rank of the dense
    array (with axes of size 1), and static fields count axes from the end and never depend on
    values; so `jax.vmap`, `jax.lax.scan` and `jax.pmap` may strip leading axes, and optimizers may
    map over trees that hold one. Other axes than the leading one cannot be stripped.

    Subclasses define ``shape``, ``dtype``, ``materialize`` and ``specs``.
    """

    dtype: np.dtype
    # What a function loses that uses the dense form instead, for messages.
    lost_when_dense = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array, from the shapes of the fields."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """The rank of the dense array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries of the dense array."""
        return math.prod(self.shape)

    def materialize(self) -> jax.Array:
        """The dense array, of ``shape`` and ``dtype``, the same bits in every program."""
        raise NotImplementedError

    def kept(self) -> jax.Array | None:
        """Booleans of the dense shape, false where an entry is pruned; None if none is."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes that a file needs for the fields, codes packed to their true width."""
        return sum(stored_bytes(x) for x in self.children())

    @property
    def resident_bytes(self) -> int:
        """Bytes that the fields take in the memory of the backend that holds them."""
        return sum(memory_bytes(x) for x in self.children())

    def specs(self, spec: PartitionSpec) -> Self:
        """The `PartitionSpec` of each field, given the one of the dense array.

        Returns:
            The same node with specs in the place of arrays.

        Raises:
            ValueError: ``spec`` splits an axis that this form cannot split.
        """
        raise NotImplementedError

    def children(self) -> list[Any]:
        """The fields that are arrays, in order; absent ones left out."""
        values = jax.tree.leaves(self, is_leaf=lambda x: x is not self)
        return [v for v in values if isinstance(v, CompressedArray) or hasattr(v, "dtype")]

    def replace(self, **fields: Any) -> Self:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **fields)  # pyright: ignore

    def __array__(self, *_: Any, **__: Any):
        raise TypeError(self._refusal())

    def __jax_array__(self):
        raise TypeError(self._refusal())

    def _refusal(self) -> str:
        return (
            f"a {type(self).__name__} of shape {self.shape} is not an array: pass it as an "
            "argument of a lifted function (jaxopt_compress.lift), or materialize it"
        )


def is_compressed(x: Any) -> bool:
    """Whether ``x`` is one of the compressed arrays; for the ``is_leaf`` of tree functions."""
    return isinstance(x, CompressedArray)


def materialize(tree: Any) -> Any:
    """Replaces each compressed array of a tree by its dense array; other leaves stay.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> small = jc.compress({"w": jnp.ones((4, 2))}, jc.quantize("int8"))
        >>> jc.materialize(small)["w"].shape
        (4, 2)
    """

    def dense(x):
        return x.materialize() if is_compressed(x) else x

    return jax.tree.map(dense, tree, is_leaf=is_compressed)


def bits_of(dtype: Any) -> int:
    """Bits per entry that a dtype really needs."""
    dtype = jnp.dtype(dtype)
    if dtype == np.dtype(bool):
        return 1
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return 8 * dtype.itemsize


def stored_bytes(x: Any) -> int:
    """Bytes of ``x`` in a file: sub-byte codes packed, each array filled up to a whole byte."""
    if isinstance(x, CompressedArray):
        return x.nbytes
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return math.prod(x.shape) * x.dtype.itemsize
    bits = 8 if x.dtype == bool else bits_of(x.dtype)
    return -(-math.prod(x.shape) * bits // 8)


def memory_bytes(x: Any) -> int:
    """Bytes of ``x`` in device memory: only TPUs and GPUs pack codes of less than a byte."""
    if isinstance(x, CompressedArray):
        return x.resident_bytes
    traced = is_traced(x) or not isinstance(x, jax.Array)
    platform = jax.default_backend() if traced else next(iter(x.devices())).platform
    packs = platform in ("tpu", "gpu", "cuda", "rocm")
    return stored_bytes(x) if packs else math.prod(x.shape) * x.dtype.itemsize


def is_traced(x: Any) -> bool:
    """Whether ``x`` has no values yet, being an argument of a function that is traced."""
    return isinstance(x, Tracer)


def is_key(x: Any) -> TypeGuard[jax.Array]:
    """Whether a leaf is a random key with a type of its own."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


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
