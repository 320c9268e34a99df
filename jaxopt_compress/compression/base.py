"""What a compression is: pure functions, and the states between them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

Params = TypeVar("Params")


class CompressionState(NamedTuple):
    """The state of a compression that is made from a `Method`.

    Attributes:
        count: int32, how many updates it has seen.
        learned: Path -> floating arrays that gradients train, such as factors.
        leaves: Path -> `LeafState`, everything else that was decided.
        layouts: Path -> `Layout`, the roles of the parameter's axes; static.
    """

    count: jax.Array
    learned: dict[str, Any]
    leaves: dict[str, Any]
    layouts: dict[str, Any]


class ChainState(NamedTuple):
    """The states of several compressions, in the order of the compressions."""

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

    Parameters are any pytree. Its leaves are arrays, or compressed arrays: in a chain an element
    gets the view of the element before it, in which a factored parameter is a `LowRankArray` and a
    pruned one a `MaskedArray`. A function that needs plain arrays calls
    `jaxopt_compress.materialize` first.

    Attributes:
        init: ``init(params, *, uses=None, stats=None) -> state``. Decides masks, scales, ranks.
            ``uses`` and ``stats`` are the results of `uses` and `calibrate`.
        update: ``update(state, params, *, grads=None) -> state``. Advances schedules, renews masks
            and scales. ``grads`` are the gradients of the loss at the view, or None. Jit-able, with
            no Python branches on values.
        apply: ``apply(params, state, *, materialize=True) -> view``. The parameters that the
            forward pass uses, with straight-through derivatives; jit-able. With
            ``materialize=False`` factored and masked parameters stay as they are, for the next
            element of a chain.
        compress: ``compress(params, state) -> small``. The stored form: a tree with compressed
            arrays as leaves. Runs outside of jit, leaf by leaf.
        forward: ``forward(params, state, *, materialize=True) -> view``, or None. The parameters at
            which the loss is taken, where these do more than ``apply`` says, such as rounding the
            activations that they meet; by default ``apply``.
        penalty: ``penalty(params, state) -> scalar``, or None. A differentiable term of the loss,
            for `compressed_training(..., penalty=weight)`.

    The contract, bit for bit: ``materialize(compress(params, state)) == apply(params, state)``.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    apply: Callable[..., Any]
    compress: Callable[..., Any]
    forward: Callable[..., Any] | None = None
    penalty: Callable[[Any, Any], jax.Array] | None = None

    def view(self, params: Params, opt_state: Any) -> Params:
        """The parameters that the forward pass uses during training.

        Args:
            params: The parameters that the optimizer updates.
            opt_state: The state of an optimizer that contains `compressed_training` somewhere,
                inside any optax wrapper; or the compression's own, from ``init`` or ``update``.

        Returns:
            The view of ``params`` at which the loss and its gradients are taken. Its leaves are
            dense arrays, unless activations are rounded too: then they are compressed arrays, for
            functions under `lift`.

        Raises:
            ValueError: ``opt_state`` holds no state of a compression.
        """
        for state in compression_states(opt_state):
            params = self.loss_view(params, state)
        return params

    def loss_view(self, params: Params, state: Any, *, materialize: bool = True) -> Params:
        """``forward(params, state)``, or ``apply(params, state)`` if there is no ``forward``."""
        return (self.forward or self.apply)(params, state, materialize=materialize)


NO_COMPRESSION = (
    "this state holds no compression: wrap the optimizer by "
    "jaxopt_compress.compressed_training(optimizer, compression) before its init"
)

OF_AN_OPTIMIZER = (
    "this is the state of an optimizer, which view(params, state) of a compression and "
    "jaxopt_compress.compress(params, compression, state=state) take; its apply and compress take "
    "its own, from its init"
)


def compression_states(state: Any) -> list[Any]:
    """The states of compressions inside the state of an optimizer; or the state itself."""
    return [s.compression for s in training_states(state)] or [state]


def training_states(opt_state: Any) -> list[TrainingState]:
    """The states of `compressed_training` inside an optimizer state."""
    is_state = lambda x: isinstance(x, TrainingState)
    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x)]


def method_states(state: Any) -> list[CompressionState]:
    """The states of methods inside a state."""
    is_state = lambda x: isinstance(x, CompressionState)
    return [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]


def learned_parts(state: Any) -> list[dict[str, Any]]:
    """The learned arrays of every compression inside a state that tells them apart."""
    return [s.learned for s in method_states(state)]


def replace_learned(state: Any, learned: list[dict[str, Any]]) -> Any:
    """The same state with other learned arrays."""
    parts = iter(learned)
    new = lambda x: x._replace(learned=next(parts)) if isinstance(x, CompressionState) else x
    return jax.tree.map(new, state, is_leaf=lambda x: isinstance(x, CompressionState))


def inner_states(state: Any, compressions: Sequence[Compression]) -> tuple[Any, ...]:
    """The states of several compressions inside the state of the whole.

    Raises:
        ValueError: It is the state of something else.
    """
    states = getattr(state, "states", ())
    if len(states) != len(compressions):
        text = f"this is not the state of this compression, which has {len(compressions)} parts"
        if training_states(state):
            text = OF_AN_OPTIMIZER
        elif not method_states(state):
            text = NO_COMPRESSION
        raise ValueError(text)
    return states
