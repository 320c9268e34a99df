"""Values that entries share: how codebooks are laid out, and how codes find values."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxopt_compress.numerics.rounding import seal

# Up to here values are selected, which compilers fuse; a lookup in a longer table is a gather.
_SELECTED = 16


class Books(NamedTuple):
    """How an array is cut into vectors, and which of them share a codebook.

    Attributes:
        axis: The negative axis along which vectors and groups run.
        groups: How many codebooks there are along it, each for consecutive entries.
        vector: Entries per vector.
        apart: Negative axes, not ``axis``, each index of which has codebooks of its own.
    """

    axis: int
    groups: int = 1
    vector: int = 1
    apart: tuple[int, ...] = ()

    def _order(self, rank: int) -> tuple[list[int], list[int]]:
        """Axes of books and of members, after the axis has become groups, vectors and entries."""
        at = rank + self.axis
        moved = lambda d: d if d < at else d + 2
        apart = [moved(rank + d) for d in sorted(self.apart)]
        pooled = [moved(d) for d in range(rank) if d != at and d - rank not in self.apart]
        return [*apart, at], sorted([*pooled, at + 1])

    def members(self, x: jax.Array) -> jax.Array:
        """The vectors of each codebook, ``[books, members, vector]``."""
        at = x.ndim + self.axis
        books, members = self._order(x.ndim)
        each = x.shape[at] // (self.groups * self.vector)
        split = (*x.shape[:at], self.groups, each, self.vector, *x.shape[at + 1 :])
        x = x.reshape(split)
        size = lambda axes: math.prod(split[d] for d in axes)
        return x.transpose(*books, *members, at + 2).reshape(
            size(books), size(members), self.vector
        )

    def codes(self, codes: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Codes ``[books, members]`` in the place of the vectors of an array of a shape."""
        at = len(shape) + self.axis
        books, members = self._order(len(shape))
        each = shape[at] // (self.groups * self.vector)
        split = (*shape[:at], self.groups, each, 1, *shape[at + 1 :])
        order = [*books, *members, at + 2]
        x = codes.reshape([split[d] for d in order])
        x = x.transpose(sorted(range(len(order)), key=order.__getitem__))
        return x.reshape(*shape[:at], self.groups * each, *shape[at + 1 :])

    def centroids(self, centroids: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Centroids ``[books, clusters, vector]`` in the rank of an array of a shape.

        They run along ``axis``, group after group; other axes have size 1 but those that are apart.
        """
        rank, at = len(shape), len(shape) + self.axis
        apart = [rank + d for d in sorted(self.apart)]
        clusters = centroids.shape[1]
        x = centroids.reshape(*(shape[d] for d in apart), self.groups * clusters * self.vector)
        order = sorted([*apart, at])
        # The axis came last; it goes to its place among the others.
        x = jnp.moveaxis(x, -1, order.index(at))
        sizes = [shape[d] if d in apart else 1 for d in range(rank)]
        sizes[at] = self.groups * clusters * self.vector
        return x.reshape(sizes)


def values_of(
    codes: jax.Array,
    centroids: jax.Array,
    dtype: jax.typing.DTypeLike,
    axis: int,
    clusters: int,
    vector: int,
) -> jax.Array:
    """Centroids, rounded to a dtype, in the place of their codes; the same bits in every program.

    Arguments are as of `look_up`. Derivatives of centroids are summed in float32.
    """
    top = float(jnp.finfo(dtype).max)
    table = seal(jnp.clip(centroids.astype(jnp.float32), -top, top), dtype).astype(jnp.float32)
    return look_up(codes, table, axis, clusters, vector).astype(dtype)


def look_up(codes: jax.Array, table: jax.Array, axis: int, clusters: int, vector: int) -> jax.Array:
    """The values of codes.

    Args:
        codes: Integers below ``clusters``, one for each ``vector`` entries along ``axis``.
        table: An array of the rank of ``codes``: along ``axis`` the entries of ``clusters`` vectors
            for each group; along others as long as the codes, or of size 1.
        axis: Negative.
        clusters: Vectors per codebook.
        vector: Entries per vector.

    Returns:
        An array of the dtype of ``table``, longer along ``axis`` by a factor of ``vector``.

    Example:
        >>> import jax.numpy as jnp
        >>> table = jnp.array([0.0, 0.5, 1.0, -1.0])
        >>> look_up(jnp.array([1, 0, 1]), table, -1, clusters=2, vector=2).tolist()
        [1.0, -1.0, 0.0, 0.5, 1.0, -1.0]
    """
    at = codes.ndim + axis
    before, after = codes.shape[:at], codes.shape[at + 1 :]
    groups = table.shape[at] // (clusters * vector)
    own = (*table.shape[:at], groups, clusters, vector, *table.shape[at + 1 :])
    books = table.reshape(own)
    wide = codes.reshape(*before, groups, codes.shape[at] // groups, *after)
    read = _selected if clusters <= _SELECTED else _gathered
    found = read(wide.astype(jnp.int32), books, at + 1)
    return found.reshape(*before, codes.shape[at] * vector, *after)


def _selected(codes: jax.Array, books: jax.Array, at: int) -> jax.Array:
    """A tree of selections, one bit of the code per storey."""
    codes = jnp.expand_dims(codes, at + 1)
    storey = [lax.slice_in_dim(books, k, k + 1, axis=at) for k in range(books.shape[at])]
    shape = np.broadcast_shapes(codes.shape, storey[0].shape)
    bit = 0
    while len(storey) > 1:
        odd = (codes >> bit) & 1 == 1
        pairs = [storey[i : i + 2] for i in range(0, len(storey), 2)]
        storey = [jnp.where(odd, p[-1], p[0]) for p in pairs]
        bit += 1
    return jnp.broadcast_to(storey[0], shape)


def _gathered(codes: jax.Array, books: jax.Array, at: int) -> jax.Array:
    """A lookup in the codebooks, one after the other."""
    clusters, vector = books.shape[at : at + 2]
    lead = (*books.shape[:at], *books.shape[at + 2 :])
    flat = jnp.moveaxis(books, (at, at + 1), (-2, -1)).reshape(-1, vector)
    first = clusters * jnp.arange(math.prod(lead), dtype=jnp.int32).reshape(lead)
    index = codes + jnp.expand_dims(first, at)
    sharding, split = getattr(jax.typeof(index), "sharding", None), None
    if sharding is not None and AxisType.Explicit in sharding.mesh.axis_types:
        spec = (*sharding.spec, *(None,) * (index.ndim - len(sharding.spec)))
        split = NamedSharding(sharding.mesh, PartitionSpec(*spec, None))
    found = flat.at[index].get(mode="clip", out_sharding=split)
    return jnp.moveaxis(found, -1, at + 1)
