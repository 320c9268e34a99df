"""From parameters to their stored form, by one compression or a recipe of several."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax

from jaxopt_compress.compression.base import (
    ChainState,
    Compression,
    apply_state,
    compress_state,
    describes_itself,
    leaf_states,
    training_states,
)
from jaxopt_compress.compression.checks import check_init
from jaxopt_compress.tree import AssumedLayout, map_named, named_leaves
from jaxopt_compress.tree.paths import glob_matches, select

Recipe = Mapping[str, Compression]


def compress(
    params: Any,
    recipe: Compression | Recipe,
    uses: Any = None,
    stats: Any = None,
    state: Any = None,
) -> Any:
    """Compresses a tree of parameters.

    Runs outside of jit, one leaf at a time.

    Args:
        params: A pytree of arrays; compressed arrays in it may be compressed further.
        recipe: A `Compression`, or a mapping from globs to compressions: each parameter goes to the
            first glob that matches its path, and parameters that none matches stay as they are.
        uses: What `uses` found, so that channels and groups follow the function; otherwise the axes
            are assumed, with a warning where that is a guess.
        stats: What `calibrate` found, for methods that need data.
        state: The state of an optimizer made by `compressed_training`, or of the compression
            itself: what was decided in training is what is stored. By default everything is decided
            here, as at step 0 of a schedule.

    Returns:
        The tree with compressed arrays as leaves.

    Raises:
        ValueError: A pattern that matches nothing, or a setting that cannot work for a leaf; names
            the leaf, before anything is computed.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"embed": jnp.ones((8, 4)), "mlp": {"kernel": jnp.ones((4, 6))}}
        >>> recipe = {"embed": jc.quantize("int8"), "**/kernel": jc.low_rank(rank=2)}
        >>> small = jc.compress(params, recipe)
        >>> type(small["embed"]).__name__, type(small["mlp"]["kernel"]).__name__
        ('QuantizedArray', 'LowRankArray')
    """
    compression = as_compression(recipe)
    if state is None:
        return compression.compress(params, compression.init(params, uses=uses, stats=stats))
    states = _compression_states(state)
    _check_asked(compression, params, uses, stats, states)
    for each in states:
        params = compression.compress(params, each)
    return params


def _check_asked(
    compression: Compression, params: Any, uses: Any, stats: Any, states: list[Any]
) -> None:
    """Refuses to store less than the recipe asks for: the states decide what is stored.

    Raises:
        ValueError: A parameter's state lacks a method that the recipe has; names both.
    """
    if len(states) > 1 or not all(map(describes_itself, states)):
        return  # Of several compressions in one optimizer, each has parameters of its own.
    kinds = jax.eval_shape(lambda p: p, params)
    kinds = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), kinds)  # On no mesh.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AssumedLayout)  # The states know the axes.
        try:
            asked = jax.eval_shape(lambda p: compression.init(p, uses=uses, stats=stats), kinds)
        except (ValueError, TypeError):
            return  # It takes more than shapes to ask, such as the uses that training had.
    trained, wanted = _methods(states), _methods([asked])
    for path in trained.keys() & wanted.keys():
        if wanted[path] - trained[path]:
            raise ValueError(
                f"the recipe asks for {', '.join(sorted(wanted[path]))} of {path!r}, and the state "
                f"holds {', '.join(sorted(trained[path]))}: compress with what was trained, and "
                "compress its result further, without state"
            )


def _methods(states: list[Any]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for state in leaf_states(states):
        for path, leaf in state.leaves.items():
            found.setdefault(path, set()).add(leaf.kind)
    return found


def _compression_states(state: Any) -> list[Any]:
    found = [s.compression for s in training_states(state)]
    return found or [state]


def as_compression(recipe: Compression | Recipe) -> Compression:
    """A recipe as one compression, whose state holds that of each of its rules.

    Raises:
        TypeError: It is neither a compression nor a mapping of globs to compressions.
    """
    if isinstance(recipe, Compression):
        return recipe
    good = isinstance(recipe, Mapping) and all(
        isinstance(k, str) and isinstance(v, Compression) for k, v in recipe.items()
    )
    if not good or not recipe:
        raise TypeError(
            f"a recipe is a Compression or a mapping of globs to Compressions, not {recipe!r}"
        )
    rules = dict(recipe)

    def subtrees(params: Any) -> list[dict[str, Any]]:
        leaves = dict(named_leaves(params))
        taken: set[str] = set()
        parts = []
        for glob in rules:
            chosen = [path for path in leaves if glob_matches(glob, path) and path not in taken]
            taken.update(chosen)
            parts.append({path: leaves[path] for path in chosen})
        return parts

    def init(params: Any, *, uses: Any = None, stats: Any = None) -> ChainState:
        check_init(decide, params, uses, stats)
        return decide(params, uses=uses, stats=stats)

    def decide(params: Any, *, uses: Any, stats: Any) -> ChainState:
        parts = subtrees(params)
        for glob, part in zip(rules, parts, strict=True):
            if not part:
                select(params, glob, owner="recipe")
                raise ValueError(
                    f"recipe={glob!r} gets no leaf, since earlier patterns match all of its; put "
                    "the narrower pattern first"
                )
        pairs = zip(rules.values(), parts, strict=True)
        return ChainState(tuple(c.init(part, uses=uses, stats=stats) for c, part in pairs))

    def each(params: Any, state: ChainState) -> Any:
        return zip(rules.values(), subtrees(params), state.states, strict=True)

    def merged(params: Any, parts: list[dict[str, Any]]) -> Any:
        new = {path: leaf for part in parts for path, leaf in part.items()}
        return map_named(lambda path, leaf: new.get(path, leaf), params)

    def update(state: ChainState, params: Any) -> ChainState:
        return ChainState(tuple(c.update(inner, part) for c, part, inner in each(params, state)))

    def apply(params: Any, state: ChainState, *, materialize: bool = True) -> Any:
        if describes_itself(state):
            return apply_state(params, state, materialize=materialize)
        trios = each(params, state)
        return merged(params, [c.apply(p, s, materialize=materialize) for c, p, s in trios])

    def compress(params: Any, state: ChainState) -> Any:
        if describes_itself(state):
            return compress_state(params, state)
        return merged(params, [c.compress(p, s) for c, p, s in each(params, state)])

    return Compression(init, update, apply, compress)
