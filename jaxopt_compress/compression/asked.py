"""Whether a state holds what a compression asks for."""

import dataclasses
import warnings
from typing import Any

import jax

from jaxopt_compress.compression.base import Compression
from jaxopt_compress.compression.states import method_states
from jaxopt_compress.tree import NoLeaf


def check_asked(
    compression: Compression, params: Any, uses: Any, stats: Any, states: list[Any]
) -> None:
    """Refuses to store something else than a recipe asks for: states decide what is stored.

    Settings are compared where the recipe finds the roles of a parameter's axes as the state has
    them: without the uses that training had it may not.

    Raises:
        ValueError: A parameter's state lacks a method that the recipe has, or has it with other
            settings; or the recipe chooses nothing. Names the parameter and what differs.
    """
    if len(states) > 1:
        return  # Of several compressions in one optimizer, each has parameters of its own.
    kinds = jax.eval_shape(lambda p: p, params)
    kinds = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), kinds)  # On no mesh.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # The states know the axes and the leaves.
        try:
            asked = jax.eval_shape(lambda p: compression.init(p, uses=uses, stats=stats), kinds)
        except NoLeaf:
            raise
        except (ValueError, TypeError):
            return  # It takes more than shapes to ask, such as the uses that training had.
    trained, wanted = _leaves(states), _leaves([asked])
    for path in trained.keys() & wanted.keys():
        has, wants = ({leaf.kind: leaf for leaf, _ in found[path]} for found in (trained, wanted))
        if wants.keys() - has.keys():
            raise ValueError(
                f"the recipe asks for {', '.join(sorted(wants))} of {path!r}, and the state "
                f"holds {', '.join(sorted(has))}: compress with what was trained, and "
                "compress its result further, without state"
            )
        if [layout for _, layout in trained[path]] != [layout for _, layout in wanted[path]]:
            continue
        for kind, leaf in wants.items():
            if other := _differences(leaf, has[kind]):
                raise ValueError(
                    f"the recipe's {kind} of {path!r} differs in {', '.join(other)} from what the "
                    "state holds: compress with what was trained"
                )


def _leaves(states: list[Any]) -> dict[str, list[tuple[Any, Any]]]:
    """Path -> leaf state and layout of each method, in order."""
    found: dict[str, list[tuple[Any, Any]]] = {}
    for state in method_states(states):
        for path, leaf in state.leaves.items():
            found.setdefault(path, []).append((leaf, state.layouts.get(path)))
    return found


def _differences(ours: Any, theirs: Any) -> list[str]:
    """What differs between two states; of arrays only the shapes are compared."""
    if type(ours) is not type(theirs):
        return ["its kind"]
    fields = dataclasses.fields(ours) if dataclasses.is_dataclass(ours) else ()
    return [
        f.name for f in fields if _form(getattr(ours, f.name)) != _form(getattr(theirs, f.name))
    ]


def _form(x: Any) -> Any:
    """What can be told without values."""
    leaves, treedef = jax.tree.flatten(x)
    return treedef, [tuple(leaf.shape) if hasattr(leaf, "shape") else leaf for leaf in leaves]
