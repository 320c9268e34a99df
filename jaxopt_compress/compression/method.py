"""Methods: what decides how parameters are compressed, and the compression made from one."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import is_compressed, map_factors
from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.compression.base import Compression
from jaxopt_compress.compression.checks import check_finite
from jaxopt_compress.compression.leaf_states import (
    LeafState,
    apply_leaves,
    as_jax,
    compress_leaves,
    forward_leaves,
    left_alone,
    parameters_of,
)
from jaxopt_compress.compression.parameter import Parameter
from jaxopt_compress.compression.selection import chosen_parameters
from jaxopt_compress.compression.states import Asked, CompressionState
from jaxopt_compress.lift import Stats, Uses
from jaxopt_compress.tree import Where, named_leaves
from jaxopt_compress.tree.meshes import on_auto_axes
from jaxopt_compress.typing import Leaf, PyTree


class Decision(NamedTuple):
    """A method's decision about one parameter.

    Attributes:
        state: A `LeafState`.
        learned: Floating arrays that gradients train, or None.
    """

    state: PyTree
    learned: PyTree = None


Parameters = Mapping[str, Parameter]
Decisions = dict[str, Decision]


class Method(NamedTuple):
    """How the chosen parameters are compressed, decided for all of them together.

    Attributes:
        check: ``check({path: parameter})``. Raises, from shapes and dtypes alone, where the method
            cannot work.
        init: ``init({path: parameter}) -> {path: Decision}``.
        update: ``update({path: decision}, count, {path: parameter}) -> {path: Decision}``, or None
            if nothing ever changes. ``count`` is int32: 1 at the first update.
        penalty: ``penalty({path: decision}, {path: parameter}) -> scalar``, or None.
    """

    check: Callable[[Parameters], None]
    init: Callable[[Parameters], Decisions]
    update: Callable[[Decisions, jax.Array, Parameters], Decisions] | None = None
    penalty: Callable[[Decisions, Parameters], jax.Array] | None = None


class LeafMethod(NamedTuple):
    """How one parameter is compressed, whatever becomes of the others.

    Attributes:
        check: ``check(parameter)``.
        init: ``init(parameter) -> Decision``.
        update: ``update(decision, count, parameter) -> Decision``, or None.
        penalty: ``penalty(decision, parameter) -> scalar``, or None.
    """

    check: Callable[[Parameter], None]
    init: Callable[[Parameter], Decision]
    update: Callable[[Decision, jax.Array, Parameter], Decision] | None = None
    penalty: Callable[[Decision, Parameter], jax.Array] | None = None


def each(method: LeafMethod) -> Method:
    """The method that decides on each parameter by itself."""

    def check(parameters: Parameters) -> None:
        for parameter in parameters.values():
            method.check(parameter)

    def init(parameters: Parameters) -> Decisions:
        # One after the other, so that temporaries exist for one parameter at a time.
        ready = lambda x: x if any(map(is_traced, jax.tree.leaves(x))) else jax.block_until_ready(x)
        return {path: ready(on_auto_axes(method.init, p)) for path, p in parameters.items()}

    update, penalty = method.update, method.penalty

    def updated(decisions: Decisions, count: jax.Array, parameters: Parameters) -> Decisions:
        assert update is not None
        return {k: update(d, count, parameters[k]) for k, d in decisions.items()}

    def summed(decisions: Decisions, parameters: Parameters) -> jax.Array:
        assert penalty is not None
        terms = [penalty(d, parameters[k]) for k, d in decisions.items()]
        return jnp.sum(jnp.stack(terms))

    return Method(check, init, update and updated, penalty and summed)


def compression_of(
    method: Method | LeafMethod, where: Where, *, stack: int = 0, asked: str = ""
) -> Compression:
    """The compression of the parameters that ``where`` chooses, as ``method`` decides.

    Args:
        method: A `Method`, which decides over all of them together, or a `LeafMethod`.
        where: Which parameters; by default the floating ones of rank 2 and more, and where uses are
            given only those with a use.
        stack: How many leading axes of each are a stack of parameters of their own, such as the
            members of an ensemble, whatever uses say of them.
        asked: The call that makes the compression, by `spelled`: ``update``, ``apply``,
            ``compress`` and ``forward`` refuse the state of another one. By default they do not
            look.

    Returns:
        A `Compression`; it trains, chains and joins recipes as any other.

    Example:
        >>> import dataclasses, jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> from jaxopt_compress.compression import Decision, LeafMethod, LeafState, compression_of
        >>> @jax.tree_util.register_dataclass
        ... @dataclasses.dataclass(frozen=True)
        ... class Clipped(LeafState):
        ...     limit: jax.Array
        ...     kind = "clip"
        ...     keeps = frozenset({"zeros", "n:m"})
        ...
        ...     def apply(self, w, learned):
        ...         return jnp.clip(jc.materialize(w), -self.limit, self.limit)
        ...
        ...     def compress(self, w, learned, path):
        ...         return self.apply(w, learned)
        >>> def clip(share, where=None):
        ...     limit = lambda p: share * jnp.max(jnp.abs(p.dense()))
        ...     decide = lambda p: Decision(Clipped(limit(p)))
        ...     update = lambda decision, count, p: decide(p)
        ...     return compression_of(LeafMethod(lambda p: None, decide, update), where)
        >>> params = {"w": jnp.array([[1.0, -4.0], [3.0, 0.5]])}
        >>> small = jc.compress(params, jc.chain(clip(0.5), jc.quantize("int8")))
        >>> small["w"].materialize().round(1)
        Array([[ 1. , -2. ],
               [ 2. ,  0.5]], dtype=float32)
    """
    method = each(method) if isinstance(method, LeafMethod) else method

    def init(
        params: PyTree, *, uses: Uses | None = None, stats: Stats | None = None
    ) -> CompressionState:
        parameters = chosen_parameters(params, where, uses, stats, stack)
        method.check(parameters)
        for path, parameter in parameters.items():
            check_finite(path, parameter.value)
        count = jnp.zeros((), jnp.int32)
        layouts = {path: p.layout for path, p in parameters.items()}
        left = left_alone(params, parameters)
        return _state(count, method.init(parameters), layouts, Asked(asked, left))

    def update(
        state: CompressionState, params: PyTree, *, grads: PyTree = None
    ) -> CompressionState:
        _check_asked(asked, state)
        # Saturates, as optax's counters do: a wrapped one would start all schedules anew.
        count = jnp.where(state.count < jnp.iinfo(jnp.int32).max, state.count + 1, state.count)
        if method.update is None:
            return state._replace(count=count)
        decisions = method.update(_decisions(state), count, current(state, params, grads))
        return _state(count, decisions, state.layouts, state.asked)

    def checked(run: Callable[..., PyTree]) -> Callable[..., Any]:
        def same(params: PyTree, state: PyTree, **given: Any) -> PyTree:
            _check_asked(asked, state)
            return run(params, state, **given)

        return same

    def current(state: CompressionState, params: PyTree, grads: PyTree = None) -> Parameters:
        slopes, found = _by_path(grads), {}
        for path, w in parameters_of(params, state).items():
            keep = w.kept() if is_compressed(w) else None
            layout, slope = state.layouts[path], slopes.get(path)
            found[path] = Parameter(path, w, layout, keep=keep, grad=slope)
        return found

    def penalty(params: PyTree, state: CompressionState) -> jax.Array:
        assert method.penalty is not None
        return method.penalty(_decisions(state), current(state, params))

    term = method.penalty and penalty
    apply, compress, forward = map(checked, (apply_leaves, compress_leaves, forward_leaves))
    return Compression(init, update, apply, compress, forward, term, asked)


def spelled(name: str, *args: PyTree, **kwargs: Any) -> str:
    """A call as it is written, with the arguments that are literals, and not None.

    Example:
        >>> spelled("quantize", "int4", group_size=32, bounds=None)
        "quantize('int4', group_size=32)"
    """
    simple = lambda x: isinstance(x, bool | int | float | str | list | tuple)
    words = [repr(x) for x in args if simple(x)]
    words += [f"{k}={x!r}" for k, x in kwargs.items() if simple(x)]
    return f"{name}({', '.join(words)})"


def made(x: Any) -> str:
    """The call that made a function, or a tuple of them, for `spelled`; its arguments are unknown.

    Example:
        >>> import jaxopt_compress as jc
        >>> spelled("prune", made(jc.scores.magnitude()), made(jc.schedules.constant(0.5)))
        'prune(magnitude(...), constant(...))'
    """
    fn = x[0] if isinstance(x, tuple) else x
    name = getattr(fn, "__qualname__", type(fn).__name__)
    return _Unquoted(f"{name.partition('.<locals>')[0].lstrip('_')}(...)")


class _Unquoted(str):
    """Text that stands for itself."""

    __repr__ = str.__str__


def _check_asked(asked: str, state: PyTree) -> None:
    """Refuses the state of another compression, before it is followed in silence."""
    if not isinstance(state, CompressionState) or not asked or not state.asked.method:
        return
    if state.asked.method != asked:
        paths = ", ".join(sorted(state.leaves)[:3])
        raise ValueError(
            f"the recipe asks for {asked}, and the state holds {state.asked.method} of {paths}: "
            "compress with what was trained, and compress its result further, without state"
        )


def _state(
    count: jax.Array, decisions: Decisions, layouts: dict[str, Any], asked: Asked
) -> CompressionState:
    learned = {k: d.learned for k, d in decisions.items() if d.learned is not None}
    leaves: dict[str, LeafState] = {k: d.state for k, d in decisions.items()}
    return CompressionState(count, learned, leaves, layouts, asked)


def _decisions(state: CompressionState) -> Decisions:
    return {k: Decision(leaf, state.learned.get(k)) for k, leaf in state.leaves.items()}


def _by_path(grads: PyTree) -> dict[str, jax.Array]:
    """Gradients of dense parameters and of factors by their paths."""
    found: dict[str, jax.Array] = {}

    def take(path: str, g: Leaf) -> Leaf:
        if not is_compressed(g):
            found[path] = as_jax(g)
        return g

    for path, g in named_leaves(grads):
        map_factors(take, path, g)
    return found
