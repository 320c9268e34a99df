"""The states of compressions and of training, and finding them inside of others."""

import dataclasses
from typing import Any, NamedTuple

import jax

from jaxopt_compress.typing import PyTree


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Asked:
    """The call that made a compression; static, so that no other one takes its state.

    Attributes:
        method: The call that made the compression, with what decides the stored form, such as
            ``quantize('int4', group_size=32)``; empty if it is not known.
        left: The paths of the matrices that it left alone; None if some may have been hidden from
            it, as optax's masks do.
    """

    method: str = ""
    left: frozenset[str] | None = None


class CompressionState(NamedTuple):
    """The state of a compression that is made from a `Method`.

    Attributes:
        count: int32, how many updates it has seen.
        learned: Path -> floating arrays that gradients train, such as factors.
        leaves: Path -> `LeafState`, everything else that was decided.
        layouts: Path -> `Layout`, the roles of the parameter's axes; static.
        asked: What was asked for; static.
    """

    count: jax.Array
    learned: dict[str, PyTree]
    leaves: dict[str, Any]
    layouts: dict[str, Any]
    asked: Asked = Asked()


class ChainState(NamedTuple):
    """The states of several compressions, in the order of the compressions."""

    states: tuple[PyTree, ...]


class TrainingState(NamedTuple):
    """The state of `compressed_training`.

    Attributes:
        inner: The state of the wrapped optimizer.
        learned: The optimizer state of the learned parts, or None where there are none.
        compression: The state of the compression.
    """

    inner: Any
    learned: PyTree
    compression: Any


NO_COMPRESSION = (
    "this state holds no compression: wrap the optimizer by "
    "jaxopt_compress.compressed_training(optimizer, compression) before its init"
)

OF_AN_OPTIMIZER = (
    "this is the state of an optimizer, which view(params, state) of a compression and "
    "jaxopt_compress.compress(params, compression, state=state) take; its apply and compress take "
    "its own, from its init"
)


def compression_states(state: PyTree) -> list[Any]:
    """The states of compressions inside the state of an optimizer; or the state itself."""
    return [s.compression for s in training_states(state)] or [state]


def training_states(opt_state: PyTree) -> list[TrainingState]:
    """The states of `compressed_training` inside an optimizer state."""
    is_state = lambda x: isinstance(x, TrainingState)
    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x)]


def method_states(state: PyTree) -> list[CompressionState]:
    """The states of methods inside a state."""
    is_state = lambda x: isinstance(x, CompressionState)
    return [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]


def learned_parts(state: PyTree) -> list[dict[str, Any]]:
    """The learned arrays of every compression inside a state that tells them apart."""
    return [s.learned for s in method_states(state)]


def replace_learned(state: PyTree, learned: list[dict[str, PyTree]]) -> PyTree:
    """The same state with other learned arrays."""
    parts = iter(learned)
    new = lambda x: x._replace(learned=next(parts)) if isinstance(x, CompressionState) else x
    return jax.tree.map(new, state, is_leaf=lambda x: isinstance(x, CompressionState))


def describes_itself(state: PyTree) -> bool:
    """Whether a state is made of states of methods alone, whose leaves carry out what they hold."""
    inner = getattr(state, "states", None)
    if isinstance(inner, tuple):
        return all(map(describes_itself, inner))
    return isinstance(state, CompressionState)
