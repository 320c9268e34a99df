"""What a compression is: four pure functions and the state between them."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import InputQuantizedArray, LowRankArray, is_compressed, materialize
from jaxopt_compress.compression.checks import check_finite
from jaxopt_compress.tree import Layout, map_named, named_leaves
from jaxopt_compress.tree.meshes import on_auto_axes

Params = TypeVar("Params")


class LeafState:
    """What was decided for one parameter: the base of frozen pytree dataclasses.

    Its arrays are masks, scales and the like; what is static never depends on values. Two methods
    must agree: ``materialize(compress(w, learned, path)) == materialize(apply(w, learned))``.

    Attributes:
        kind: The method's name, by which chains refuse orders that do not compose.
        replaces: Whether learned arrays stand for the parameter, which then gets no updates.
        keeps_zeros: Whether 0.0 stays 0.0, so that it may follow pruning.
        needs_lift: Whether its ``view`` is for lifted functions only, being no array.
    """

    kind: Any
    replaces: bool = False
    keeps_zeros: Any = False
    needs_lift: Any = False

    def apply(self, w: Any, learned: Any) -> Any:
        """The parameter that the forward pass uses; differentiable, jit-able."""
        raise NotImplementedError

    def compress(self, w: Any, learned: Any, path: str) -> Any:
        """The stored form of that parameter; runs outside of jit."""
        raise NotImplementedError

    def view(self, w: Any, learned: Any) -> Any:
        """What a forward pass uses in training: an array, or what also says what products do."""
        return self.apply(w, learned)

    def before(self, g: jax.Array) -> jax.Array:
        """``g`` itself, a gradient, computed after what an update has read the parameter for."""
        return g


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
        init: ``init(params, *, uses=None, stats=None) -> state``. Decides masks, scales, ranks.
            ``uses`` and ``stats`` are what `uses` and `calibrate` return.
        update: ``update(state, params) -> state``. Advances schedules, refreshes masks and scales;
            jit-able, no Python branches on values.
        apply: ``apply(params, state, *, materialize=True) -> view``. What the forward pass uses,
            with straight-through derivatives; jit-able. With ``materialize=False`` factored
            parameters stay factored, so that the next element of a chain can compress the factors.
        compress: ``compress(params, state) -> small``. The stored form: a tree with compressed
            arrays as leaves. Runs outside of jit, leaf by leaf.

    The contract, bit for bit: ``materialize(compress(params, state)) == apply(params, state)``.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    apply: Callable[..., Any]
    compress: Callable[..., Any]

    def view(self, params: Params, opt_state: Any) -> Params:
        """The parameters that the forward pass uses during training.

        Args:
            params: The parameters that the optimizer updates.
            opt_state: The state of an optimizer that contains `compressed_training` somewhere,
                inside any optax wrapper; or the compression's own, from ``init`` or ``update``.

        Returns:
            The compressed view of ``params``; gradients are taken at it. It is made of dense
            arrays, unless activations are to be rounded too: such a leaf is a compressed array, for
            functions under `lift`.

        Raises:
            ValueError: ``opt_state`` holds no state of a compression.
        """
        own = isinstance(opt_state, CompressionState | ChainState)
        found = [opt_state] if own else [s.compression for s in training_states(opt_state)]
        if not found:
            raise ValueError(NO_COMPRESSION)
        for state in found:
            params = forward_view(self.apply, params, state)
        return params


NO_COMPRESSION = (
    "this state holds no compression: wrap the optimizer by "
    "jaxopt_compress.compressed_training(optimizer, compression) before its init"
)

OF_AN_OPTIMIZER = (
    "this is the state of an optimizer, which view(params, state) of a compression and "
    "jaxopt_compress.compress(params, compression, state=state) take; its apply and compress take "
    "its own, from its init"
)


def training_states(opt_state: Any) -> list[TrainingState]:
    """The states of `compressed_training` inside an optimizer state."""
    is_state = lambda x: isinstance(x, TrainingState)
    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x)]


def learned_parts(state: Any) -> list[dict[str, Any]]:
    """The learned arrays of every compression inside a state that tells them apart."""
    return [s.learned for s in leaf_states(state)]


def replace_learned(state: Any, learned: list[dict[str, Any]]) -> Any:
    """The same state with other learned arrays."""
    parts = iter(learned)
    new = lambda x: x._replace(learned=next(parts)) if isinstance(x, CompressionState) else x
    return jax.tree.map(new, state, is_leaf=lambda x: isinstance(x, CompressionState))


def leaf_states(state: Any) -> list[CompressionState]:
    """The states made of leaf states inside a state."""
    return [x for x in _split(state) if isinstance(x, CompressionState)]


def describes_itself(state: Any) -> bool:
    """Whether a state is made of leaf states alone, which carry out what they decided."""
    return all(isinstance(x, CompressionState) for x in _split(state))


def _split(state: Any) -> list[Any]:
    return jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, CompressionState))


def forward_view(apply: Callable[..., Any], params: Any, state: Any) -> Any:
    """The view that training uses: that of ``apply``, or one that also says what products do."""
    lifted = any(x.needs_lift for s in leaf_states(state) for x in s.leaves.values())
    if not lifted or not describes_itself(state):
        return apply(params, state)
    return _dense(_applied(params, state, lambda leaf: leaf.view), state)


def apply_state(params: Any, state: Any, *, materialize: bool = True) -> Any:
    """The view that a state describes; the ``apply`` of all compressions made of leaf states."""
    params = _applied(params, state, lambda leaf: leaf.apply)
    return _dense(params, state) if materialize else params


def _applied(params: Any, state: Any, method: Callable[[Any], Callable[..., Any]]) -> Any:
    """What ``method(leaf state)(w, learned)`` makes of each parameter, state after state."""
    if isinstance(state, ChainState):
        for inner in state.states:
            params = _applied(params, inner, method)
        return params
    run = lambda path, w, leaf: method(leaf)(w, state.learned.get(path))
    return map_states(run, params, state)


def compress_state(params: Any, state: Any) -> Any:
    """The stored form that a state describes; the ``compress`` of every such compression.

    Raises:
        ValueError: A parameter holds infinities or NaNs.
    """
    if isinstance(state, ChainState):
        for inner in state.states:
            params = compress_state(params, inner)
        return params
    for path, w in parameters_of(params, state).items():
        check_finite(path, w)

    def run(path: str, w: Any, leaf: Any) -> Any:
        stored = lambda w, leaf, learned: leaf.compress(w, learned, path)
        return on_auto_axes(stored, w, leaf, state.learned.get(path))

    return map_states(run, params, state)


def parameters_of(params: Any, state: CompressionState) -> dict[str, Any]:
    """Path -> leaf, of the parameters that the state knows."""
    found: dict[str, Any] = {}

    def keep(path: str, w: Any, leaf: Any) -> Any:
        del leaf
        found[path] = w
        return w

    map_states(keep, params, state)
    return found


def map_states(fn: Callable[[str, Any, Any], Any], params: Any, state: CompressionState) -> Any:
    """Maps ``fn(path, leaf, leaf state)`` over the parameters that the state knows.

    Raises:
        ValueError: It is no such state, or knows a parameter that is not there.
    """
    if not isinstance(state, CompressionState):
        raise ValueError(OF_AN_OPTIMIZER if training_states(state) else NO_COMPRESSION)
    missing = set(state.leaves)

    def known(path: str, leaf: Any) -> Any:
        if path not in state.leaves:
            return leaf
        missing.discard(path)
        return fn(path, as_jax(leaf), state.leaves[path])

    mapped = map_named(lambda path, leaf: map_factors(known, path, leaf), params)
    if missing:
        paths = [path for path, _ in named_leaves(params)]
        raise ValueError(
            "the state was made for parameters that are not here: "
            f"{', '.join(sorted(missing)[:8])}; here are {', '.join(paths[:8])}"
        )
    return mapped


def _dense(params: Any, state: Any) -> Any:
    """Materializes what the state has made; compressed leaves that it leaves alone stay."""
    touched = {path for s in leaf_states(state) for path in s.leaves}
    owner = lambda path: any(t == path or t.startswith(f"{path}/") for t in touched)
    runs = lambda x: isinstance(x, InputQuantizedArray)

    def dense(path: str, leaf: Any) -> Any:
        if not is_compressed(leaf) or not owner(path):
            return leaf
        # What its products do besides has no dense form.
        held = any(map(runs, jax.tree.leaves(leaf, is_leaf=runs)))
        return leaf if held else materialize(leaf)

    return map_named(dense, params)


def as_jax(leaf: Any) -> Any:
    """NumPy arrays in a type that JAX has: float64 only with 64-bit types."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


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
