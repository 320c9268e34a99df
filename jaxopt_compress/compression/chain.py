"""Several compressions of the same parameters, one after the other."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import MaskedArray, SumArray, is_compressed, map_factors, materialize
from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.compression.base import Compression, inner_states
from jaxopt_compress.compression.checks import check_init
from jaxopt_compress.compression.compress import Recipe, as_compression
from jaxopt_compress.compression.leaf_states import (
    GRID,
    N_M,
    PRODUCTS,
    RANK,
    ZEROS,
    LeafState,
    dense_like,
    factor_owner,
)
from jaxopt_compress.compression.states import ChainState, method_states
from jaxopt_compress.lift import Stats, Uses
from jaxopt_compress.tree import named_leaves
from jaxopt_compress.typing import Leaf, PyTree

# Why a property would be lost, and what to do instead.
_LOST = {
    ZEROS: "its zeros would be lost; prune last, or keep one of the two",
    N_M: "its n:m pattern would be lost; prune last, or keep one of the two",
    RANK: "it would no longer be a product of thin factors; choose a smaller rank, or keep one of "
    "the two",
    GRID: "its values would leave the grid; quantize last, such as in chain(low_rank(...), "
    "quantize(...)), and once only",
    PRODUCTS: "it has to come last, since it wraps the stored weight: move it to the end of the "
    "chain",
}


def chain(*compressions: Compression | Recipe) -> Compression:
    """Applies compressions in order, each one to the view that the ones before it have made.

    Later elements keep what earlier ones established: zeros stay zeros, n:m patterns stay, values
    stay on their grid, and after `low_rank` the factors are compressed. Elements may choose
    different parameters, and may be compressions of your own.

    Args:
        *compressions: At least one; recipes ``{glob: Compression}`` too.

    Returns:
        A `Compression` with the state of all of them.

    Raises:
        ValueError: In ``init``, for an order that cannot keep what came before, or what an element
            refuses, before anything is computed; and for an element that has not kept it in its
            result. Names the parameter.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> prune = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5))
        >>> params = {"w": jnp.arange(1.0, 9.0).reshape(4, 2)}
        >>> small = jc.compress(params, jc.chain(prune, jc.quantize("int8")))
        >>> small["w"].materialize()[:, 0].round(2)
        Array([0.  , 0.  , 5.  , 6.97], dtype=float32)
    """
    if not compressions:
        raise ValueError("chain() needs at least one compression")
    elements = [as_compression(c) for c in compressions]
    if len(elements) == 1:
        return elements[0]

    def init(params: PyTree, *, uses: Uses | None = None, stats: Stats | None = None) -> ChainState:
        check_init(decide, params, uses, stats)
        return decide(params, uses=uses, stats=stats)

    def decide(params: PyTree, *, uses: Uses | None, stats: Stats | None) -> ChainState:
        states: list[PyTree] = []
        established: dict[str, dict[str, str]] = {}
        seen: dict[str, PyTree] = {}
        for c in elements:
            state = c.init(params, uses=uses, stats=stats)
            _check_order(established, state, params)
            view = c.apply(params, state, materialize=False)
            _check_kept(established, seen, view, state)
            _add(established, state)
            params, states = view, [*states, state]
        return ChainState(tuple(states))

    def update(state: ChainState, params: PyTree, *, grads: PyTree = None) -> ChainState:
        states = []
        for c, inner in _pairs(elements, state):
            inner = c.update(inner, params, grads=grads)
            params = c.apply(params, inner, materialize=False)
            states.append(inner)
        return ChainState(tuple(states))

    def apply(params: PyTree, state: ChainState, *, materialize: bool = True) -> PyTree:
        view = params
        for c, inner in _pairs(elements, state):
            view = c.apply(view, inner, materialize=False)
        return dense_like(view, params) if materialize else view

    def forward(params: PyTree, state: ChainState, *, materialize: bool = True) -> PyTree:
        view = params
        for c, inner in _pairs(elements, state):
            view = c.loss_view(view, inner, materialize=False)
        return dense_like(view, params) if materialize else view

    def compress(params: PyTree, state: ChainState) -> PyTree:
        for c, inner in _pairs(elements, state):
            params = c.compress(params, inner)
        return params

    def penalty(params: PyTree, state: ChainState) -> jax.Array:
        terms = []
        for c, inner in _pairs(elements, state):
            terms += [] if c.penalty is None else [c.penalty(params, inner)]
            params = c.apply(params, inner, materialize=False)
        return jnp.sum(jnp.stack(terms))

    any_penalty = any(c.penalty is not None for c in elements)
    term = penalty if any_penalty else None
    call = f"chain({', '.join(map(repr, elements))})"
    return Compression(init, update, apply, compress, forward, term, call)


def _pairs(elements: Sequence[Compression], state: PyTree) -> list[tuple[Compression, Any]]:
    return list(zip(elements, inner_states(state, elements), strict=True))


def _leaves(state: PyTree) -> list[tuple[str, LeafState]]:
    """``(path of the parameter, leaf state)`` of the methods inside a state."""
    return [pair for s in method_states(state) for pair in s.leaves.items()]


def _check_order(established: dict[str, dict[str, str]], state: PyTree, params: PyTree) -> None:
    """Refuses an element that does not keep what came before, as far as methods say."""
    for path, leaf in _leaves(state):
        owner = factor_owner(path, established)
        lost = [p for p in established.get(owner, {}) if p not in leaf.keeps]
        if not lost:
            continue
        first = lost[0]
        shape = next(tuple(w.shape) for name, w in named_leaves(params) if name == owner)
        raise ValueError(
            f"chain: {leaf.kind} cannot follow {established[owner][first]} at {owner!r} of shape "
            f"{shape}: {leaf.why_lost(first) or _LOST[first]}"
        )


def _add(established: dict[str, dict[str, str]], state: PyTree) -> None:
    for path, leaf in _leaves(state):
        own = established.setdefault(factor_owner(path, established), {})
        own.update({name: leaf.kind for name in leaf.establishes if name not in own})


def _check_kept(
    established: dict[str, dict[str, str]], seen: dict[str, PyTree], view: PyTree, state: PyTree
) -> None:
    """Refuses an element whose result has lost a property, whatever it says of itself.

    Args:
        established: Path -> property -> the method that established it.
        seen: Path -> the latest view with that property; advanced here.
        view: The element's result.
        state: The element's state.
    """
    for path, new in named_leaves(view):
        old = seen.get(path)
        if isinstance(new, SumArray) and not isinstance(old, SumArray) and old is not None:
            new = new.parts[0]  # Further parts have properties of their own.
        if path in established and old is not None and new is not old:
            lost = [p for p in established[path] if p in _TESTS and not _TESTS[p](old, new)]
            if lost:
                kind = dict(_leaves(state)).get(path)
                raise ValueError(
                    f"chain: {'an element' if kind is None else kind.kind} has not kept the "
                    f"{lost[0]} of {established[path][lost[0]]} at {path!r} of shape "
                    f"{tuple(new.shape)}: {_LOST[lost[0]]}"
                )
        # A mask outlives an element that returns a dense array.
        masked = is_compressed(old) and old.kept() is not None  # pyright: ignore
        if not masked or is_compressed(new):
            seen[path] = new


def _true(x: jax.Array) -> bool:
    return is_traced(x) or bool(x)


def _zeros_kept(old: Leaf, new: Leaf) -> bool:
    # The values themselves: a mask that is put over them again would hide a loss.
    values = new.values if isinstance(new, MaskedArray) else new
    mask = old.kept() if is_compressed(old) else None
    dense = materialize(values)
    return mask is None or _true(jnp.all(mask | (dense == 0)))


def _grid_kept(old: Leaf, new: Leaf) -> bool:
    pairs = zip(_dense_factors(old), _dense_factors(new), strict=True)
    return all(_true(jnp.all((a == b) | (b == 0))) for a, b in pairs)


def _dense_factors(x: Leaf) -> list[jax.Array]:
    """The dense array; or those of the factors of a factored one."""
    found: list[jax.Array] = []
    map_factors(lambda path, y: found.append(materialize(y)) or y, "", x)
    return found


_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    ZEROS: _zeros_kept,
    N_M: _zeros_kept,
    GRID: _grid_kept,
    RANK: lambda old, new: type(new) is type(old),
}
