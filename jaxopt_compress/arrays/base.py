"""Compressed parameters: pytree nodes that each stand for one dense array."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxopt_compress.arrays.fields import (
    Distances,
    Packing,
    bits_of,
    is_traced,
    narrow_spec,
    pad_spec,
)
from jaxopt_compress.arrays.layout import Layout
from jaxopt_compress.arrays.leaf_types import LEAF_TYPES
from jaxopt_compress.arrays.not_an_array import NotAnArray
from jaxopt_compress.typing import Leaf, PyTree


class CompressedArray(NotAnArray):
    """A dense array in another form: a frozen pytree dataclass, made by `compressed_array`.

    Children are arrays or again compressed arrays. Every array child keeps the rank of the dense
    array (with axes of size 1), and static fields count axes from the end and never depend on
    values; so `jax.vmap`, `jax.lax.scan` and `jax.pmap` may strip leading axes, and optimizers may
    map over trees that hold one. Other axes than the leading one cannot be stripped.

    Subclasses define ``shape``, ``dtype`` and ``materialize``, and what else is not the default.
    """

    dtype: np.dtype
    # For messages: the loss to a function that uses the dense form instead.
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

    def check_dtypes(self) -> None:
        """Refuses fields whose dtype is not that of the form, such as codes times a float.

        Raises:
            TypeError: Says what the field holds and how to compute with the tree.
        """

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
        entries = pad_spec(spec, self.ndim)

        def split(x: Leaf) -> Leaf | PartitionSpec:
            own = narrow_spec(entries, tuple(x.shape))
            return x.specs(own) if isinstance(x, CompressedArray) else own

        fields = {name: getattr(self, name) for name in LEAF_TYPES[type(self).__name__].data}
        return self.replace(**{k: split(x) for k, x in fields.items() if x is not None})

    def factors(self) -> dict[str, Leaf]:
        """Name -> the array or compressed array that it is a product of; empty if it is none."""
        return {}

    def with_factors(self, factors: Mapping[str, Leaf]) -> Self:
        """The same product of other factors."""
        del factors
        return self

    def factor_layouts(self, layout: Layout) -> dict[str, Layout]:
        """Name -> the roles of the factor's axes.

        Args:
            layout: The roles of the axes of the dense array.
        """
        del layout
        return {}

    def factor_inputs(self, name: str, layout: Layout) -> jax.Array | None:
        """How inputs of the dense array become those of a factor.

        Args:
            name: The factor.
            layout: The roles of the axes of the dense array.

        Returns:
            ``A``, ``[*stack, k, r]``: where the dense array meets a vector ``x``, the factor meets
            ``x @ A``; or None, where it meets ``x`` itself.
        """
        del name, layout
        return None

    def describe(self) -> str:
        """The method behind it in a few words, such as ``"int4 g32"``."""
        return type(self).__name__.removesuffix("Array").lower()

    def check(self) -> None:
        """Looks at the shapes and dtypes of the fields and at what is static, not at values.

        Raises:
            ValueError: They do not fit each other.
        """
        _ = self.shape

    def stored_widths(self, bits: int | None) -> dict[str, int | None]:
        """Bits per entry in files, of fields whose dtype has more.

        Args:
            bits: The width that a compressed array around this one gives it, or None.
        """
        del bits
        return {}

    def packings(self) -> Mapping[str, Packing | Distances]:
        """How fields of words hold codes, for coders that look at one code at a time."""
        return {}

    def __repr__(self) -> str:
        try:
            shape, size = self.shape, max(self.size, 1)
            kind = f"{jnp.dtype(self.dtype).name}[{','.join(map(str, shape))}]"
            text = f"{self.describe()}, {kind}, {8 * self.nbytes / size:.3g} bits per weight"
            return f"{type(self).__name__}({text}, {self.nbytes:,} bytes)"
        except (AttributeError, TypeError, ValueError):
            # Tree functions put all kinds of objects in the place of arrays.
            fields = dataclasses.fields(self)  # pyright: ignore
            inner = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields)
            return f"{type(self).__name__}({inner})"

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        # Treescope, which notebooks show trees by, calls it: that line, and its fields on request.
        from treescope import rendering_parts

        fields = dataclasses.fields(self)  # pyright: ignore
        return rendering_parts.build_custom_foldable_tree_node(
            label=rendering_parts.text(repr(self)),
            contents=rendering_parts.fold_condition(
                expanded=rendering_parts.indented_children(
                    rendering_parts.build_field_children(self, path, subtree_renderer, fields)
                )
            ),
            path=path,
            expand_state=rendering_parts.ExpandState.COLLAPSED,
        )

    def children(self) -> list[Leaf]:
        """The fields that are arrays, in order; absent ones left out."""
        inner = lambda x: x is not self and isinstance(x, CompressedArray)
        values = jax.tree.leaves(self, is_leaf=inner)
        return [v for v in values if inner(v) or hasattr(v, "dtype")]

    def replace(self, **fields: Any) -> Self:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **fields)  # pyright: ignore


def is_compressed(x: Leaf) -> bool:
    """Whether ``x`` is one of the compressed arrays; for the ``is_leaf`` of tree functions."""
    return isinstance(x, CompressedArray)


def describe(x: Leaf) -> str:
    """The method behind a leaf in a few words.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> describe(jc.compress({"w": jnp.ones((8, 2))}, jc.quantize("int4", group_size=4))["w"])
        'int4 g4'
    """
    return x.describe() if is_compressed(x) else "dense"


def map_factors(fn: Callable[[str, PyTree], PyTree], path: str, leaf: Leaf) -> Leaf:
    """Applies ``fn(path, array)`` to a parameter, or to each factor of one that has factors.

    Returns:
        The result, or the parameter with the results as its factors; ``leaf`` itself if each of
        them is the same object as before.
    """
    factors = leaf.factors() if is_compressed(leaf) else {}
    if not factors:
        return fn(path, leaf)
    new = {name: fn(f"{path}/{name}", x) for name, x in factors.items()}
    return leaf if all(new[k] is x for k, x in factors.items()) else leaf.with_factors(new)


def materialize(tree: PyTree) -> PyTree:
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


def map_dense(fn: Callable[..., PyTree], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps a function over the leaves of trees, compressed arrays as dense ones.

    ``jax.tree.map`` reaches the fields of compressed arrays, for which arithmetic has no meaning:
    the sum of two codes is not the code of a sum, and where both are of one dtype nothing can tell.

    Args:
        fn: A function of as many arrays as there are trees.
        tree: A pytree.
        *rest: Trees of the same structure, up to which leaves are compressed.

    Returns:
        The tree of results. They are dense.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jnp.ones((4, 2))}
        >>> small = jc.compress(params, jc.quantize("int8"))
        >>> jc.map_dense(jnp.subtract, params, small)["w"].shape
        (4, 2)
    """
    return jax.tree.map(fn, *map(materialize, (tree, *rest)))


def stored_bytes(x: Leaf) -> int:
    """Bytes of ``x`` in a file: sub-byte codes packed, each array filled up to a whole byte."""
    if isinstance(x, CompressedArray):
        return x.nbytes
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return math.prod(x.shape) * x.dtype.itemsize
    bits = 8 if x.dtype == bool else bits_of(x.dtype)
    return -(-math.prod(x.shape) * bits // 8)


def memory_bytes(x: Leaf) -> int:
    """Bytes of ``x`` in device memory: only TPUs and GPUs pack codes of less than a byte."""
    if isinstance(x, CompressedArray):
        return x.resident_bytes
    traced = is_traced(x) or not isinstance(x, jax.Array)
    platform = jax.default_backend() if traced else next(iter(x.devices())).platform
    packs = platform in ("tpu", "gpu", "cuda", "rocm")
    return stored_bytes(x) if packs else math.prod(x.shape) * x.dtype.itemsize
