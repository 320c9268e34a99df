"""Decisions for each parameter, and carrying them out over a tree."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_compress.arrays import InputQuantizedArray, MaskedArray, is_compressed, map_factors
from jaxopt_compress.compression.checks import check_finite
from jaxopt_compress.compression.states import (
    NO_COMPRESSION,
    OF_AN_OPTIMIZER,
    CompressionState,
    describes_itself,
    training_states,
)
from jaxopt_compress.tree import map_named, named_leaves
from jaxopt_compress.tree.meshes import on_auto_axes
from jaxopt_compress.tree.paths import is_float
from jaxopt_compress.typing import Leaf, PyTree

# Properties of a parameter that one element of a chain establishes and later ones have to keep.
ZEROS = "zeros"  # entries under a mask stay 0.0
N_M = "n:m"  # at most n of m consecutive entries differ from 0.0
RANK = "rank"  # a product of thin factors
GRID = "grid"  # values are levels of a number format
PRODUCTS = "products"  # its products round activations or gradients too


class LeafState:
    """The decisions for one parameter: the base of frozen pytree dataclasses.

    Its arrays are masks, scales and the like; static fields never depend on values. Two functions
    have to agree: ``materialize(compress(w, learned, path)) == materialize(apply(w, learned))``.

    Attributes:
        kind: The method's name, for messages.
        establishes: Properties that the result has: `ZEROS`, `N_M`, `RANK`, `GRID`, `PRODUCTS`.
        keeps: Properties of its input that the result has too. A chain checks them on the result.
        replaces: Whether learned arrays stand for the parameter, which then gets no updates.
    """

    kind: Any
    establishes: Any = frozenset()
    keeps: Any = frozenset()
    replaces: bool = False

    def apply(self, w: Leaf, learned: PyTree) -> PyTree:
        """The parameter that the forward pass uses; differentiable, jit-able."""
        raise NotImplementedError

    def compress(self, w: Leaf, learned: PyTree, path: str) -> PyTree:
        """The stored form of that parameter; runs outside of jit."""
        raise NotImplementedError

    def forward(self, w: Leaf, learned: PyTree) -> PyTree:
        """The array that the loss sees: as `apply`, or one that also changes its products."""
        return self.apply(w, learned)

    def before(self, g: jax.Array) -> jax.Array:
        """``g`` itself, a gradient, computed after what an update has read the parameter for."""
        return g

    def rests(self) -> jax.Array | None:
        """Booleans, true where training holds the parameter and its moments at 0; or None."""
        return None

    def why_lost(self, name: str) -> str | None:
        """Why a property is not kept, for the message of a chain; None for the general reason."""
        del name
        return None


def apply_leaves(params: PyTree, state: PyTree, *, materialize: bool = True) -> PyTree:
    """The view that leaf states describe, also those of several methods in order."""
    view = _applied(params, state, for_loss=False)
    return dense_like(view, params) if materialize else view


def forward_leaves(params: PyTree, state: PyTree, *, materialize: bool = True) -> PyTree:
    """As `apply_leaves`, the view at which the loss is taken."""
    view = _applied(params, state, for_loss=True)
    return dense_like(view, params) if materialize else view


def _applied(params: PyTree, state: PyTree, for_loss: bool) -> PyTree:
    if describes_itself(state) and not isinstance(state, CompressionState):
        for inner in state.states:
            params = _applied(params, inner, for_loss)
        return params

    def run(path: str, w: Leaf, leaf: LeafState) -> PyTree:
        made = (leaf.forward if for_loss else leaf.apply)(w, state.learned.get(path))
        # Later elements of a chain learn the mask from the view.
        masked = isinstance(w, MaskedArray) and not is_compressed(made)
        return w.replace(values=made) if masked else made

    return map_states(run, params, state)


def compress_leaves(params: PyTree, state: PyTree) -> PyTree:
    """The stored form that leaf states describe, also those of several methods in order.

    Raises:
        ValueError: A parameter holds infinities or NaNs.
    """
    if describes_itself(state) and not isinstance(state, CompressionState):
        for inner in state.states:
            params = compress_leaves(params, inner)
        return params
    for path, w in parameters_of(params, state).items():
        check_finite(path, w)
    _check_all_known(params, state)

    def run(path: str, w: Leaf, leaf: LeafState) -> PyTree:
        stored = lambda w, leaf, learned: leaf.compress(w, learned, path)
        # One after the other: what JAX is asked for ahead takes memory for all at once.
        return jax.block_until_ready(on_auto_axes(stored, w, leaf, state.learned.get(path)))

    return map_states(run, params, state)


def left_alone(params: PyTree, chosen: Iterable[str]) -> frozenset[str] | None:
    """The matrices that a compression does not choose; None if optax hides some from it."""
    hidden = lambda x: isinstance(x, optax.MaskedNode)
    if any(map(hidden, jax.tree.leaves(params, is_leaf=hidden))):
        return None
    found = frozenset(p for p, w in named_leaves(params) if is_float(w) and len(w.shape) >= 2)
    return found - {factor_owner(path, found) for path in chosen}


def _check_all_known(params: PyTree, state: PyTree) -> None:
    """Refuses parameters that were not there when the state was made."""
    if not isinstance(state, CompressionState) or state.asked.left is None:
        return
    new = (left_alone(params, state.leaves) or frozenset()) - state.asked.left
    if new:
        raise ValueError(
            f"the state was made without {', '.join(sorted(new)[:8])}, which would stay as they "
            "are: init it from the parameters that are compressed"
        )


def parameters_of(params: PyTree, state: CompressionState) -> dict[str, Any]:
    """Path -> leaf, of the parameters that the state knows."""
    found: dict[str, Any] = {}

    def keep(path: str, w: Leaf, leaf: Leaf) -> Leaf:
        del leaf
        found[path] = w
        return w

    map_states(keep, params, state)
    return found


def map_states(
    fn: Callable[[str, PyTree, PyTree], PyTree], params: PyTree, state: CompressionState
) -> PyTree:
    """Maps ``fn(path, leaf, leaf state)`` over the parameters that the state knows.

    Raises:
        ValueError: It is another kind of state, or knows a parameter that is not there.
    """
    if not isinstance(state, CompressionState):
        raise ValueError(OF_AN_OPTIMIZER if training_states(state) else NO_COMPRESSION)
    missing = set(state.leaves)

    def known(path: str, leaf: Leaf) -> Leaf:
        if path not in state.leaves:
            return leaf
        missing.discard(path)
        return fn(path, as_jax(leaf), state.leaves[path])

    mapped = map_named(lambda path, leaf: map_factors(known, path, leaf), params)
    if missing:
        paths = [path for path, _ in named_leaves(params)]
        raise ValueError(
            "the tree lacks parameters that the state was made for: "
            f"{', '.join(sorted(missing)[:8])}; it has {', '.join(paths[:8])}"
        )
    return mapped


def dense_like(view: PyTree, params: PyTree) -> PyTree:
    """Materializes what a compression has made of parameters; leaves that it left alone stay.

    What its products do besides has no dense form, and stays too.
    """
    runs = lambda x: isinstance(x, InputQuantizedArray)

    def dense(path: str, new: Leaf, old: Leaf) -> Leaf:
        del path
        if new is old or not is_compressed(new):
            return new
        if not any(map(runs, jax.tree.leaves(new, is_leaf=runs))):
            return new.materialize()
        # Lifted functions have no need for the mask: what it leaves out is 0.0.
        return new

    return map_named(dense, view, params)


def as_jax(leaf: Leaf) -> Leaf:
    """NumPy arrays in a type that JAX has: float64 only with 64-bit types."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def factor_owner(path: str, owners: Any) -> str:
    """The path of the parameter that a factor's path belongs to; other paths as they are."""
    owner = path.rpartition("/")[0]
    return owner if owner in owners and path not in owners else path
