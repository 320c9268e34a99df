"""The codes of one parameter that shares values."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import (
    CodebookArray,
    MaskedArray,
    SparseArray,
    SumArray,
    is_compressed,
)
from jaxopt_compress.arrays.codebook import code_bits, code_dtype, codes_block
from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.compression import LeafState
from jaxopt_compress.compression.leaf_states import GRID, N_M, RANK, ZEROS
from jaxopt_compress.numerics.packing import pack
from jaxopt_compress.numerics.rounding import seal
from jaxopt_compress.numerics.shared import Books, values_of
from jaxopt_compress.typing import Leaf, PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "active"],
    meta_fields=["books", "clusters", "zero", "moves", "held"],
)
@dataclasses.dataclass(frozen=True)
class SharedState(LeafState):
    """What was decided for one parameter; its centroids are ``learned["centroids"]``.

    Attributes:
        codes: The cluster of each vector.
        active: Whether sharing has begun, a boolean; None if it always has.
        books: Which vectors share a codebook.
        clusters: Per codebook.
        zero: Whether the first centroid is 0 and stays there.
        moves: Whether the parameter itself is trained on, since codes are decided again.
        held: The name of the dtype that holds centroids.
    """

    codes: Any
    active: Any
    books: Books
    clusters: int
    zero: bool
    moves: bool
    held: str
    kind = "share"
    establishes = frozenset({GRID})

    @property
    def keeps(self) -> frozenset[str]:
        """Zeros of numbers: by a mask, or by a centroid that is 0. Factors stay factors."""
        return frozenset({RANK} if self.books.vector > 1 else {RANK, ZEROS, N_M})

    @property
    def replaces(self) -> bool:  # pyright: ignore
        """Whether centroids alone are trained from the start."""
        return self.active is None and not self.moves

    def why_lost(self, name: str) -> str | None:
        """Names the length of vectors."""
        if name in (ZEROS, N_M):
            return (
                f"a vector of {self.books.vector} entries has one code, whichever of them are 0: "
                "share with vector=1"
            )
        return None

    def centroids(self, learned: PyTree) -> jax.Array:
        """Centroids as they are stored, differentiable."""
        c = learned["centroids"]
        if self.zero:
            books, at = self.books, c.ndim + self.books.axis
            each = (self.clusters * books.vector,)
            place = jnp.arange(c.shape[at]) % each[0] < books.vector
            c = jnp.where(place.reshape([-1 if d == at else 1 for d in range(c.ndim)]), 0.0, c)
        top = float(jnp.finfo(self.held).max)
        return seal(jnp.clip(c, -top, top), self.held)

    def apply(self, w: Leaf, learned: PyTree) -> jax.Array:
        """Each entry's centroid; ``w`` itself before sharing begins."""
        mask = w.kept() if is_compressed(w) else None
        w = dense(w)
        how = (w.dtype, self.books.axis, self.clusters, self.books.vector)
        view = values_of(self.codes, self.centroids(learned), *how)
        view = view if mask is None else jnp.where(mask, view, jnp.zeros((), w.dtype))
        view = _moving(w, view) if self.moves else view
        return view if self.active is None else jnp.where(self.active, view, w)

    def compress(self, w: Leaf, learned: PyTree, path: str) -> Any:
        """Codes and centroids; the codes of a sparse array stay sparse."""
        if not _begun(self.active, path):
            return w
        sparse = isinstance(w, SparseArray)
        axis, vector = self.books.axis, self.books.vector
        block = None if sparse else codes_block(self.codes.shape[axis], self.clusters)
        codes = self.codes
        if sparse:
            codes = w.with_entries(codes)
        elif block is not None:
            codes = pack(codes, code_bits(self.clusters), axis, block)
        dtype, centroids = np.dtype(w.dtype), self.centroids(learned)
        return CodebookArray(codes, centroids, dtype, self.clusters, axis, vector, block)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["parts", "active"], meta_fields=["moves"]
)
@dataclasses.dataclass(frozen=True)
class SumState(LeafState):
    """What was decided for a parameter of which each vector has several codes.

    Attributes:
        parts: A state for each codebook; its centroids are ``learned["centroids0"]`` and so on.
        active: As in `SharedState`.
        moves: As in `SharedState`.
    """

    parts: tuple[SharedState, ...]
    active: Any
    moves: bool
    kind = "share_sums"
    establishes = frozenset({GRID})
    keeps = frozenset({RANK})

    @property
    def replaces(self) -> bool:  # pyright: ignore
        """As in `SharedState`."""
        return self.active is None and not self.moves

    def own(self, learned: PyTree, i: int) -> dict[str, Any]:
        """What is learned of one codebook."""
        return {"centroids": learned[f"centroids{i}"]}

    def apply(self, w: Leaf, learned: PyTree) -> jax.Array:
        """The sum of the centroids of each vector; ``w`` itself before sharing begins."""
        w = dense(w)
        views = (part.apply(w, self.own(learned, i)) for i, part in enumerate(self.parts))
        view = SumArray(tuple(views)).materialize()
        view = _moving(w, view) if self.moves else view
        return view if self.active is None else jnp.where(self.active, view, w)

    def compress(self, w: Leaf, learned: PyTree, path: str) -> Any:
        """Codes and centroids of each codebook."""
        if not _begun(self.active, path):
            return w
        own = ((part, self.own(learned, i)) for i, part in enumerate(self.parts))
        return SumArray(tuple(part.compress(w, c, path) for part, c in own))


def _begun(active: Any, path: str) -> bool:
    """Whether sharing has, by a boolean that may be None for always."""
    if active is None:
        return True
    if is_traced(active):
        raise TypeError(
            f"{path!r} is stored in a form that depends on the update that its state is at: "
            "compress it outside of jit, vmap and eval_shape"
        )
    return bool(jnp.all(active))


@jax.custom_jvp
def _moving(w: jax.Array, view: jax.Array) -> jax.Array:
    """``view``, with the derivatives of ``w`` besides its own."""
    del w
    return view


@_moving.defjvp
def _moving_jvp(primals: PyTree, tangents: PyTree) -> Any:
    return _moving(*primals), tangents[0] + tangents[1]


def dense(w: Leaf) -> jax.Array:
    """A pruned parameter as a dense one; others as they are."""
    return w.materialize() if isinstance(w, SparseArray | MaskedArray) else w


def as_codes(codes: jax.Array, clusters: int) -> jax.Array:
    """Codes in the dtype that holds so many."""
    return codes.astype(code_dtype(clusters))
