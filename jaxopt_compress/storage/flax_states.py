"""States and compressed trees for `flax.serialization`."""

from collections.abc import Callable

import jax

from jaxopt_compress.arrays.layout import Layout
from jaxopt_compress.arrays.leaf_types import LEAF_TYPES
from jaxopt_compress.compression import LeafState
from jaxopt_compress.compression.best_of import BestState
from jaxopt_compress.compression.states import Asked
from jaxopt_compress.typing import Leaf, PyTree


def register_flax_serialization() -> None:
    """Lets `flax.serialization` take states of compressions and trees with compressed arrays.

    ``to_bytes``, ``from_bytes``, ``to_state_dict`` and ``from_state_dict`` then go through them as
    through dataclasses of Flax. What is static, such as number formats, is taken from the target.
    Call it once, after the definitions of methods of your own; `save` and orbax need no such call.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> from flax import serialization
        >>> jc.register_flax_serialization()
        >>> small = jc.compress({"w": jnp.ones((4, 2))}, jc.quantize("int8"))
        >>> serialization.from_bytes(small, serialization.to_bytes(small))["w"].codes.dtype
        dtype('int8')
    """
    from flax import serialization

    kinds = [kind.type for kind in LEAF_TYPES.values()]
    for cls in {*kinds, *_subclasses(LeafState), BestState, Layout, Asked}:

        def to_state(x: Leaf) -> dict[str, PyTree]:
            found = {name: serialization.to_state_dict(child) for name, child in _children(x)}
            return found | _form(x)

        def from_state(target: Leaf, state: PyTree) -> Leaf:
            named, form = _children(target), _form(target)
            if not isinstance(state, dict) or {k: state.get(k) for k in form} != form:
                held = state.get("form") if isinstance(state, dict) else type(state).__name__
                raise ValueError(f"the target is {form.get('form')}, and the data are {held}")
            missing = sorted({name for name, _ in named} ^ (state.keys() - form.keys()))
            if missing:
                kind = type(target).__name__
                raise ValueError(f"{', '.join(missing)} of {kind} are on one side only")
            new = [serialization.from_state_dict(child, state[name], name) for name, child in named]
            return jax.tree.structure(target, is_leaf=_below(target)).unflatten(new)

        serialization.register_serialization_state(cls, to_state, from_state, override=True)


def _form(x: Leaf) -> dict[str, str]:
    """What is static in a compressed array, by which its fields are read."""
    kind = LEAF_TYPES.get(type(x).__name__)
    if kind is None or kind.type is not type(x):
        return {}
    static = (f"{name}={getattr(x, name)}" for name in kind.static)
    return {"form": f"{type(x).__name__}({', '.join(static)})"}


def _children(x: Leaf) -> list[tuple[str, PyTree]]:
    found, _ = jax.tree_util.tree_flatten_with_path(x, is_leaf=_below(x))
    return [(jax.tree_util.keystr(path, simple=True), child) for path, child in found]


def _below(x: Leaf) -> Callable[[PyTree], bool]:
    """Whether something is a field of ``x``, and there."""
    return lambda y: y is not x and y is not None


def _subclasses(cls: type) -> list[type]:
    return [x for sub in cls.__subclasses__() for x in (sub, *_subclasses(sub))]
