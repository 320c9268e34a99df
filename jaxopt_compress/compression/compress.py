"""From parameters to their stored form, by one compression or a recipe of several."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.arrays.base import stored_bytes
from jaxopt_compress.compression.base import Compression, inner_states
from jaxopt_compress.compression.checks import check_init
from jaxopt_compress.compression.leaf_states import compress_leaves, dense_like
from jaxopt_compress.compression.selection import check_given
from jaxopt_compress.compression.states import (
    ChainState,
    compression_states,
    describes_itself,
)
from jaxopt_compress.lift import Stats, Uses, uses_by_layout
from jaxopt_compress.tree import (
    Fit,
    Glob,
    Part,
    fit_of,
    fits,
    kind_of,
    map_named,
    may_miss,
    named_leaves,
    warn_of_vectors,
)
from jaxopt_compress.typing import PyTree


class LargerWarning(UserWarning):
    """A stored form takes more bytes than what it was made of."""


Globs = str | Glob | tuple[str | Glob, ...]
Recipe = Mapping[Globs, Compression]


def compress(
    params: PyTree,
    recipe: Compression | Recipe,
    uses: Uses | None = None,
    stats: Stats | None = None,
    state: PyTree = None,
    layout: str | None = None,
) -> PyTree:
    """Compresses a tree of parameters.

    Runs outside of jit, one leaf at a time.

    Args:
        params: A pytree of arrays; compressed arrays in it may be compressed further.
        recipe: A `Compression`, or a mapping from globs (strings, `Glob`, or tuples of them) to
            compressions: each parameter goes to the first glob that takes it, and parameters that
            none takes stay as they are.
        uses: What `uses` found, so that channels and groups follow the function; otherwise the axes
            are assumed, with a warning.
        stats: What `calibrate` found, for methods that need data.
        state: The state of an optimizer made by `compressed_training`, or of the compression
            itself: the decisions of training are stored. By default everything is decided
            here, as at step 0 of a schedule.
        layout: In the place of ``uses``, for a tree whose kernels all have one layout:
            ``"in,out"``, as Flax writes them, or ``"out,in"``, as PyTorch and Equinox do.

    Returns:
        The tree with compressed arrays as leaves.

    Raises:
        TypeError: An argument is something else, such as the parameters in the place of the recipe.
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
    held = params.values() if isinstance(params, Mapping) else (params,)
    if any(isinstance(x, Compression) for x in held):
        raise TypeError(
            "compress(params, compression) takes the parameters first; its first argument here is "
            f"{kind_of(params)}{' of Compressions' * isinstance(params, Mapping)}"
        )
    compression = as_compression(recipe)
    uses = given_uses(params, uses, layout)
    if state is not None and layout is not None:
        raise ValueError(
            f"layout={layout!r} cannot be given with state=, which knows the layout of each kernel"
        )
    if state is None:
        state = compression.init(params, uses=uses, stats=stats)
    states = compression_states(state)
    small = params
    for each in states:
        alone = len(states) == 1 or not describes_itself(each)
        small = (compression.compress if alone else compress_leaves)(small, each)
    _warn_of_larger(params, small)
    return small


def _warn_of_larger(params: PyTree, small: PyTree) -> None:
    """Says which leaves take more bytes than they did."""
    before = {path: stored_bytes(w) for path, w in named_leaves(params) if hasattr(w, "dtype")}
    after = {path: stored_bytes(w) for path, w in named_leaves(small) if is_compressed(w)}
    larger = [path for path, size in after.items() if size > before.get(path, size)]
    if larger:
        first = larger[0]
        warnings.warn(
            f"the stored form of {', '.join(larger[:8])} is larger than what it was made of "
            f"({first}: {after[first]:,} bytes, {before[first]:,} before): a schedule that has not "
            "begun stores all entries (was state= forgotten?), and a rank above break-even or few "
            "entries per scale take more than they save; leave these out by where=",
            LargerWarning,
            stacklevel=3,
        )


def given_uses(params: PyTree, uses: Uses | None, layout: str | None) -> Uses | None:
    """The uses that were given, or those that follow from a layout.

    Raises:
        ValueError: Both were given.
    """
    if layout is None:
        return uses
    if uses is not None:
        raise ValueError(
            f"layout={layout!r} cannot be given with uses=, which say the layout of each kernel"
        )
    return uses_by_layout(params, layout)


def as_compression(recipe: Compression | Recipe) -> Compression:
    """A recipe as one compression, whose state holds that of each of its rules.

    Raises:
        TypeError: It is neither a compression nor a mapping of globs to compressions; says what it
            is.
    """
    if isinstance(recipe, Compression):
        return recipe
    if not isinstance(recipe, Mapping) or not recipe:
        raise TypeError(
            "a recipe is a Compression, such as quantize('int8'), or a mapping of globs to "
            f"Compressions; this is {'empty' if isinstance(recipe, Mapping) else kind_of(recipe)}"
        )
    for globs, each in recipe.items():
        if not _is_globs(globs) or not isinstance(each, Compression):
            raise TypeError(
                "a recipe maps globs, such as '**/kernel', to Compressions, such as "
                f"quantize('int8'); this one maps {kind_of(globs)} to {kind_of(each)}"
            )
    rules = dict(recipe)

    def subtrees(params: PyTree) -> list[Part]:
        parts: list[dict[str, Any]] = [{} for _ in rules]
        named: list[set[str]] = [set() for _ in rules]
        for path, leaf in named_leaves(params):
            for globs, part, names in zip(rules, parts, named, strict=True):
                if fit := fit_of(globs, path, leaf):
                    part[path] = leaf
                    names.update([path] * (fit is Fit.NAMED))
                    break
        missing = may_miss(params)
        return [Part(p, missing, names) for p, names in zip(parts, named, strict=True)]

    def init(params: PyTree, *, uses: Uses | None = None, stats: Stats | None = None) -> ChainState:
        check_init(decide, params, uses, stats)
        return decide(params, uses=uses, stats=stats)

    def decide(params: PyTree, *, uses: Uses | None, stats: Stats | None) -> ChainState:
        check_given(params, uses, stats)
        for globs in rules:
            fits(params, globs, owner="recipe")
            warn_of_vectors(params, globs)
        parts = subtrees(params)
        for globs, part in zip(rules, parts, strict=True):
            if not part and not part.may_miss:
                raise ValueError(
                    f"recipe={globs!r} gets no leaf: earlier patterns take all that it matches; "
                    "put the narrower pattern first"
                )
        pairs = zip(rules.values(), parts, strict=True)
        return ChainState(tuple(c.init(part, uses=uses, stats=stats) for c, part in pairs))

    parts_of = lambda params, state: subtrees(params)
    return in_parts(tuple(rules.values()), init, parts_of, repr(rules))


def _is_globs(key: Any) -> bool:
    each = key if isinstance(key, tuple) else (key,)
    return bool(each) and all(isinstance(glob, (str, Glob)) for glob in each)


def in_parts(
    compressions: Sequence[Compression],
    init: Callable[..., PyTree],
    parts_of: Callable[[PyTree, PyTree], list[Part]],
    call: str,
) -> Compression:
    """The compression that gives each of several ones parameters of its own.

    Args:
        compressions: In order.
        init: The whole compression's ``init``, whose state has ``states``, one per compression.
        parts_of: ``parts_of(params, state)``: path -> parameter, for each compression.
        call: The call that makes the whole.
    """

    def each(params: PyTree, state: PyTree) -> list[tuple[Compression, Part, Any]]:
        states = inner_states(state, compressions)
        return list(zip(compressions, parts_of(params, state), states, strict=True))

    def merged(params: PyTree, parts: Iterable[dict[str, Any]]) -> PyTree:
        new = {path: leaf for part in parts for path, leaf in part.items()}
        return map_named(lambda path, leaf: new.get(path, leaf), params)

    def update(state: PyTree, params: PyTree, *, grads: PyTree = None) -> PyTree:
        slopes = dict(named_leaves(grads))
        own = lambda part: part.of({path: slopes[path] for path in part if path in slopes})
        new = [c.update(s, part, grads=own(part)) for c, part, s in each(params, state)]
        return replace_states(state, tuple(new))

    def apply(params: PyTree, state: PyTree, *, materialize: bool = True) -> PyTree:
        view = merged(params, (c.apply(p, s, materialize=False) for c, p, s in each(params, state)))
        return dense_like(view, params) if materialize else view

    def forward(params: PyTree, state: PyTree, *, materialize: bool = True) -> PyTree:
        seen = (c.loss_view(p, s, materialize=False) for c, p, s in each(params, state))
        view = merged(params, seen)
        return dense_like(view, params) if materialize else view

    def compress(params: PyTree, state: PyTree) -> PyTree:
        return merged(params, (c.compress(p, s) for c, p, s in each(params, state)))

    def penalty(params: PyTree, state: PyTree) -> jax.Array:
        terms = [c.penalty(p, s) for c, p, s in each(params, state) if c.penalty is not None]
        return jnp.sum(jnp.stack(terms))

    any_penalty = any(c.penalty is not None for c in compressions)
    term = penalty if any_penalty else None
    return Compression(init, update, apply, compress, forward, term, call)


def replace_states(state: PyTree, states: tuple[PyTree, ...]) -> PyTree:
    """The same state with other states of its parts."""
    if isinstance(state, ChainState):
        return ChainState(states)
    return dataclasses.replace(state, states=states)
