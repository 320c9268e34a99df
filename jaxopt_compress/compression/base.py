"""A compression: pure functions over a tree of parameters."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from jaxopt_compress.compression.leaf_states import forward_leaves
from jaxopt_compress.compression.states import (
    NO_COMPRESSION,
    OF_AN_OPTIMIZER,
    compression_states,
    describes_itself,
    method_states,
    training_states,
)
from jaxopt_compress.typing import PyTree

Params = TypeVar("Params")


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
        call: The call that made it, with the arguments that are literals; its ``repr``.

    The contract, bit for bit: ``materialize(compress(params, state)) == apply(params, state)``.
    """

    init: Callable[..., PyTree]
    update: Callable[..., PyTree]
    apply: Callable[..., PyTree]
    compress: Callable[..., PyTree]
    forward: Callable[..., PyTree] | None = None
    penalty: Callable[[PyTree, PyTree], jax.Array] | None = None
    call: str = ""

    def __repr__(self) -> str:
        return self.call or f"<Compression by {self.init.__qualname__}>"

    def view(self, params: Params, opt_state: PyTree) -> Params:
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
        found = compression_states(opt_state)
        if len(found) == 1:
            return self.loss_view(params, found[0])
        for state in found:
            # Each has parameters of its own, and may be that of another compression.
            run = forward_leaves if describes_itself(state) else self.loss_view
            params = run(params, state)
        return params

    def loss_view(self, params: Params, state: PyTree, *, materialize: bool = True) -> Params:
        """``forward(params, state)``, or ``apply(params, state)`` if there is no ``forward``."""
        return (self.forward or self.apply)(params, state, materialize=materialize)


def inner_states(state: PyTree, compressions: Sequence[Compression]) -> tuple[Any, ...]:
    """The states of several compressions inside the state of the whole.

    Raises:
        ValueError: It is the state of something else.
    """
    states = getattr(state, "states", ())
    if len(states) != len(compressions):
        held = [s.asked.method for s in method_states(state) if s.asked.method]
        text = (
            f"the recipe has {len(compressions)} parts, and the state holds "
            f"{', '.join(held) or type(state).__name__}: compress with what was trained, and "
            "compress its result further, without state"
        )
        if training_states(state):
            text = OF_AN_OPTIMIZER
        elif not method_states(state):
            text = NO_COMPRESSION
        raise ValueError(text)
    return states
