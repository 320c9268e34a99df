"""Compressions that treat each chosen parameter on its own."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import LowRankArray
from jaxopt_compress.compression.base import (
    Compression,
    CompressionState,
    apply_state,
    as_jax,
    compress_state,
    factor_layouts,
    parameters_of,
)
from jaxopt_compress.compression.checks import check_finite
from jaxopt_compress.lift import Statistics, Use, layout_of, statistics_for
from jaxopt_compress.tree import Layout, Where, assume_layout, named_leaves, select
from jaxopt_compress.tree.layout import warn_assumed
from jaxopt_compress.tree.meshes import on_auto_axes


class Parameter(NamedTuple):
    """One parameter that a method is to compress.

    Attributes:
        path: Its path in the tree.
        value: A floating array, or a compressed array that an earlier method made.
        layout: The roles of its axes.
        stats: Statistics of the activations that meet it, or None.
    """

    path: str
    value: Any
    layout: Layout
    stats: Any

    def describe(self) -> str:
        """How errors name it."""
        return f"{self.path!r} of shape {tuple(self.value.shape)}"


class Decision(NamedTuple):
    """What a method decided for one parameter: its state, and what gradients train."""

    state: Any
    learned: Any = None


class LeafMethod(NamedTuple):
    """How one parameter is compressed.

    Attributes:
        check: ``check(parameter)``: raises, from shapes and dtypes alone, where the method cannot
            work.
        init: ``init(parameter) -> Decision``.
        update: ``update(state, count, value) -> state``, or None if nothing ever changes.
    """

    check: Callable[[Parameter], None]
    init: Callable[[Parameter], Decision]
    update: Callable[[Any, jax.Array, Any], Any] | None = None


def leafwise(method: LeafMethod, where: Where) -> Compression:
    """The compression that applies ``method`` to each parameter that ``where`` chooses."""

    def init(params: Any, *, uses: Any = None, stats: Any = None) -> CompressionState:
        parameters = _parameters(params, where, uses, stats)
        for parameter in parameters:
            method.check(parameter)
        for parameter in parameters:
            check_finite(parameter.path, parameter.value)
        decisions = {p.path: _decided(method, p) for p in parameters}
        learned = {k: d.learned for k, d in decisions.items() if d.learned is not None}
        leaves = {k: d.state for k, d in decisions.items()}
        return CompressionState(jnp.zeros((), jnp.int32), learned, leaves)

    def update(state: CompressionState, params: Any) -> CompressionState:
        count = state.count + 1
        leaves = dict(state.leaves)
        if method.update is not None:
            values = parameters_of(params, state)
            leaves = {k: method.update(s, count, values[k]) for k, s in leaves.items()}
        return CompressionState(count, state.learned, leaves)

    return Compression(init, update, apply_state, compress_state)


def _decided(method: LeafMethod, parameter: Parameter) -> Decision:
    run = lambda value, stats: method.init(parameter._replace(value=value, stats=stats))
    return on_auto_axes(run, parameter.value, parameter.stats)


def _check_maps(uses: Any, stats: Any) -> None:
    """Refuses what neither `uses` nor `calibrate` returned, such as one in the other's place."""
    for name, given, kind in (("uses", uses, Use), ("stats", stats, Statistics)):
        if given is None:
            continue
        lists = list(given.values()) if isinstance(given, Mapping) else [None]
        if not all(isinstance(x, list) and all(isinstance(e, kind) for e in x) for x in lists):
            maker = {"uses": "uses(fn, params, *args)", "stats": "calibrate(fn, params, batches)"}
            raise TypeError(f"{name}= takes what jaxopt_compress.{maker[name]} returned")


def _parameters(params: Any, where: Where, uses: Any, stats: Any) -> list[Parameter]:
    _check_maps(uses, stats)
    chosen = set(select(params, where))
    if uses is not None and not any(path in uses for path, _ in named_leaves(params)):
        raise ValueError(
            f"uses name {', '.join(sorted(uses)[:8])}, and the parameters are "
            f"{', '.join(sorted(chosen)[:8])}: call uses(fn, params, *args) with the same tree"
        )
    if where is None and uses is not None:
        # Where uses are known, biases of rank 2 and other leaves without one are no weights.
        chosen = {path for path in chosen if uses.get(path)}
        if not chosen:
            raise ValueError(f"uses name no product, convolution or lookup of {select(params)}")
    found, assumed = [], []
    for path, leaf in named_leaves(params):
        if path not in chosen:
            continue
        leaf = as_jax(leaf)
        layout = layout_of(uses[path]) if uses is not None and path in uses else None
        if layout is None:
            layout = assume_layout(leaf.shape)
            assumed += [path] if len(leaf.shape) > 2 else []
        stat = statistics_for(stats, path, layout)
        if isinstance(leaf, LowRankArray):
            left, right = factor_layouts(leaf, layout)
            found.append(Parameter(f"{path}/u", leaf.u, left, None))
            found.append(Parameter(f"{path}/v", leaf.v, right, None))
        else:
            found.append(Parameter(path, leaf, layout, stat))
    warn_assumed(assumed, where)
    return found
