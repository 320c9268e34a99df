"""What a compression is: four pure functions and the state between them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import LowRankArray, is_compressed, materialize
from jaxopt_compress.tree import Layout, map_named

Params = TypeVar("Params")


class LeafState(Protocol):
    """What was decided for one parameter: a frozen pytree dataclass.

    Its arrays are masks, scales and the like; what is static never depends on values. The two
    methods must agree: ``materialize(compress(w, learned)) == materialize(apply(w, learned))``.
    """

    kind: str

    def apply(self, w: Any, learned: Any) -> Any:
        """The parameter that the forward pass uses; differentiable, jit-able."""
        ...

    def compress(self, w: Any, learned: Any, path: str) -> Any:
        """The stored form of that parameter; runs outside of jit."""
        ...


class CompressionState(NamedTuple):
    """The state of one compression.

    Attributes:
        count: int32, how many updates it has seen.
        learned: Path -> floating arrays that gradients train, such as factors.
        leaves: Path -> `LeafState`, everything else that was decided.
    """

    count: jax.Array
    learned: dict[str, Any]
    leaves: dict[str, Any]


class ChainState(NamedTuple):
    """The states of compressions that are applied one after the other."""

    states: tuple[Any, ...]


class TrainingState(NamedTuple):
    """The state of `compressed_training`.

    Attributes:
        inner: The state of the wrapped optimizer.
        learned: The optimizer state of the learned parts, or None where there are none.
        compression: The state of the compression.
    """

    inner: Any
    learned: Any
    compression: Any


class Compression(NamedTuple):
    """A compression of parameters, as pure functions.

    Attributes:
        init: ``init(params, *, uses=None, stats=None) -> state``. Decides masks, scales, ranks. ``uses``
            and ``stats`` are what `uses` and `calibrate` return.
        update: ``update(state, params) -> state``. Advances schedules, refreshes masks and scales;
            jit-able, no Python branches on values.
        apply: ``apply(params, state, *, materialize=True) -> view``. What the forward pass uses, with
            straight-through derivatives; jit-able. With ``materialize=False`` factored parameters
            stay factored, so that the next element of a chain can compress the factors.
        compress: ``compress(params, state) -> small``. The stored form: a tree with compressed arrays
            as leaves. Runs outside of jit, leaf by leaf.

    The contract: ``materialize(compress(params, state))`` equals ``apply(params, state)``, bit for bit.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    apply: Callable[..., Any]
    compress: Callable[..., Any]

    def view(self, params: Params, opt_state: Any) -> Params:
        """The parameters that the forward pass uses during training.

        Args:
            params: The parameters that the optimizer updates.
            opt_state: The state of an optimizer that contains `compressed_training` somewhere, inside
                any optax wrapper.

        Returns:
            The compressed view of ``params``; gradients are taken at it.

        Raises:
            ValueError: ``opt_state`` holds no state of a compression.
        """
        for state in training_states(opt_state):
            params = self.apply(params, state.compression)
        return params


def training_states(opt_state: Any) -> list[TrainingState]:
    """The states of `compressed_training` inside an optimizer state.

    Raises:
        ValueError: There is none.
    """
    is_state = lambda x: isinstance(x, TrainingState)
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x)]
    if not found:
        raise ValueError(
            "the optimizer state holds no compression: wrap the optimizer by "
            "jaxopt_compress.compressed_training(optimizer, compression) before its init"
        )
    return found


def learned_parts(state: Any) -> list[dict[str, Any]]:
    """The learned arrays of every compression inside a state."""
    return [s.learned for s in _leaf_states(state)[0]]


def replace_learned(state: Any, learned: list[dict[str, Any]]) -> Any:
    """The same state with other learned arrays."""
    states, treedef = _leaf_states(state)
    new = [s._replace(learned=part) for s, part in zip(states, learned, strict=True)]
    return jax.tree.unflatten(treedef, new)


def _leaf_states(state: Any) -> tuple[list[Any], Any]:
    is_state = lambda x: isinstance(x, CompressionState)
    leaves, treedef = jax.tree.flatten(state, is_leaf=is_state)
    if not all(map(is_state, leaves)):
        raise TypeError(f"the state of a compression holds no CompressionState: {type(state)}")
    return leaves, treedef


def apply_state(params: Any, state: Any, *, materialize: bool = True) -> Any:
    """The view that a state describes; the ``apply`` of every compression built from leaf states."""
    if isinstance(state, ChainState):
        for inner in state.states:
            params = apply_state(params, inner, materialize=False)
    else:
        run = lambda path, w, leaf: leaf.apply(w, state.learned.get(path))
        params = map_states(run, params, state)
    return _dense(params, state) if materialize else params


def compress_state(params: Any, state: Any) -> Any:
    """The stored form that a state describes."""
    if isinstance(state, ChainState):
        for inner in state.states:
            params = compress_state(params, inner)
        return params
    run = lambda path, w, leaf: leaf.compress(w, state.learned.get(path), path)
    return map_states(run, params, state)


def map_states(fn: Callable[[str, Any, Any], Any], params: Any, state: CompressionState) -> Any:
    """Maps ``fn(path, leaf, leaf state)`` over the parameters that the state knows."""

    def visit(path: str, leaf: Any) -> Any:
        known = lambda name, x: fn(name, x, state.leaves[name]) if name in state.leaves else x
        return map_factors(known, path, leaf)

    return map_named(visit, params)


def _dense(params: Any, state: Any) -> Any:
    """Materializes what the state has made; compressed leaves that it leaves alone stay."""
    touched = {path for s in _leaf_states(state)[0] for path in s.leaves}
    owner = lambda path, leaf: any(t == path or t.startswith(f"{path}/") for t in touched)
    dense = lambda path, leaf: (
        materialize(leaf) if is_compressed(leaf) and owner(path, leaf) else leaf
    )
    return map_named(dense, params)


def map_factors(fn: Callable[[str, Any], Any], path: str, leaf: Any) -> Any:
    """Applies ``fn(path, array)`` to a parameter, or to both factors of a factored one."""
    if not isinstance(leaf, LowRankArray):
        return fn(path, leaf)
    return leaf.replace(u=fn(f"{path}/u", leaf.u), v=fn(f"{path}/v", leaf.v))


def factor_layouts(leaf: LowRankArray, layout: Layout) -> tuple[Layout, Layout]:
    """The layouts of the factors ``u`` and ``v`` of a parameter."""
    cut = -leaf.out_ndim
    stack = layout.stack
    left = tuple(d for d in range(-leaf.ndim, cut) if d not in stack)
    right = tuple(range(cut, 0))
    return Layout(left, (-1,), stack), Layout((cut - 1,), right, stack)


def check_finite(path: str, w: Any) -> None:
    """Refuses infinities and NaNs, where the values are known.

    Raises:
        ValueError: Names the path and how many there are.
    """
    if is_compressed(w) or isinstance(w, jax.core.Tracer) or not w.size:
        return
    bad = int(jnp.sum(~jnp.isfinite(w)))
    if bad:
        raise ValueError(
            f"{path!r} of shape {tuple(w.shape)} holds {bad} infinite or NaN entries, which no "
            "compressed form can hold; repair the checkpoint or exclude this leaf"
        )


Uses = Mapping[str, Any]
