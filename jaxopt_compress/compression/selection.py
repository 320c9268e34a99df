"""Which parameters a compression takes, with the roles of their axes and their statistics."""

import math
from collections.abc import Mapping, Sequence

from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.compression.leaf_states import as_jax
from jaxopt_compress.compression.parameter import Parameter
from jaxopt_compress.lift import Statistics, Stats, Use, Uses, layout_of, statistics_for
from jaxopt_compress.tree import (
    Fit,
    Layout,
    Part,
    Where,
    assume_layout,
    fits,
    may_miss,
    named_leaves,
    warn_of_vectors,
)
from jaxopt_compress.tree.layout import warn_assumed
from jaxopt_compress.typing import Leaf, PyTree


def chosen_parameters(
    params: PyTree, where: Where, uses: Uses | None, stats: Stats | None, stack: int = 0
) -> dict[str, Parameter]:
    """Path -> parameter, of the leaves that ``where`` chooses and the factors in them.

    Args:
        params: A pytree.
        where: Which leaves.
        uses: What `uses` found, or None.
        stats: What `calibrate` found, or None.
        stack: How many leading axes of each are stack axes, whatever uses say.

    Raises:
        TypeError: ``uses`` or ``stats`` is something else, or a chosen leaf is not floating.
        ValueError: Nothing is chosen; or ``uses`` are those of another tree.
    """
    check_given(params, uses, stats)
    if type(stack) is not int or stack < 0:
        raise ValueError(f"stack={stack!r}; it is a number of leading axes")
    fit = fits(params, where)
    warn_of_vectors(params, where)
    chosen = set(fit)
    if uses is not None:
        # Where uses are known, biases of rank 2 and other leaves without one are not weights.
        chosen = {path for path in fit if fit[path] is Fit.NAMED or uses.get(path)}
        if not chosen and not may_miss(params):
            raise ValueError(f"uses name no product, convolution or lookup of {sorted(fit)[:8]}")
    found: list[Parameter] = []
    assumed = []
    for path, leaf in named_leaves(params):
        if path not in chosen:
            continue
        leaf = as_jax(leaf)
        layout = layout_of(uses[path]) if uses is not None and path in uses else None
        if layout is None:
            layout = assume_layout(leaf.shape)
            assumed += [path] if len(leaf.shape) > 1 else []
            # Nothing is known of leading axes that are said to be stacks.
            rest = assume_layout(leaf.shape[stack:]) if 0 < stack < len(leaf.shape) else None
            layout = rest or layout
        layout = _stacked(path, tuple(leaf.shape), layout, stack)
        stat = statistics_for(stats, path, layout)
        factors = leaf.factors() if is_compressed(leaf) else {}
        if not factors:
            flops = _flops(uses.get(path, [])) if uses is not None else None
            keep = leaf.kept() if is_compressed(leaf) else None
            found.append(Parameter(path, leaf, layout, stat, keep, flops=flops))
            continue
        layouts = leaf.factor_layouts(layout)
        for name, factor in factors.items():
            own = layouts[name]
            seen = None if stat is None else _of_factor(stat, leaf, name, layout, own)
            keep = factor.kept() if is_compressed(factor) else None
            found.append(Parameter(f"{path}/{name}", factor, own, seen, keep))
    warn_assumed(assumed, where)
    return {parameter.path: parameter for parameter in found}


def _flops(used: Sequence[Use]) -> int | None:
    """The operations of a parameter's products in a call of the function, where uses tell."""
    known = [use.flops for use in used if use.flops is not None]
    return sum(known) if known and len(known) == len(used) else None


def _stacked(path: str, shape: tuple[int, ...], layout: Layout, count: int) -> Layout:
    """A layout with leading axes as stack axes.

    Raises:
        ValueError: There are fewer axes, or the function sums over one of them.
    """
    if not count:
        return layout
    axes = tuple(range(-len(shape), -len(shape) + count))
    summed = sorted(set(axes) & set(layout.contracting))
    if not 0 < count < len(shape) or summed:
        why = f"the function sums over axes {summed}" if summed else f"it has {len(shape)} axes"
        raise ValueError(
            f"stack={count} of {path!r} of shape {shape}: {why}; stack= says how many leading axes "
            "are parameters of their own, such as the members of an ensemble"
        )
    output = tuple(d for d in layout.output if d not in axes)
    return Layout(layout.contracting, output, tuple(sorted({*layout.stack, *axes})))


def _of_factor(
    stat: Statistics, leaf: Leaf, name: str, layout: Layout, own: Layout
) -> Statistics | None:
    """The statistics of a factor's inputs, from those of the whole parameter's inputs."""
    inputs = leaf.factor_inputs(name, layout)
    summed = math.prod(leaf.shape[d] for d in layout.contracting)
    if inputs is not None and inputs.shape[-2] != summed:
        return None  # Some of the axes of a factor are summed over, but not all.
    return stat.through(inputs, own.contracting)


def check_given(params: PyTree, uses: Uses | None, stats: Stats | None) -> None:
    """Refuses what neither `uses` nor `calibrate` returned, and uses of another tree.

    Raises:
        TypeError: Something else, such as one in the other's place.
        ValueError: Uses of another tree.
    """
    for name, given, kind in (("uses", uses, Use), ("stats", stats, Statistics)):
        if given is None:
            continue
        lists = list(given.values()) if isinstance(given, Mapping) else [None]
        if not all(isinstance(x, list) and all(isinstance(e, kind) for e in x) for x in lists):
            maker = {"uses": "uses(fn, params, *args)", "stats": "calibrate(fn, params, batches)"}
            raise TypeError(f"{name}= takes what jaxopt_compress.{maker[name]} returned")
    if uses is None or isinstance(params, Part):
        return  # A part of a tree may hold nothing that has uses.
    paths = [path for path, _ in named_leaves(params)]
    if not any(path in uses for path in paths):
        raise ValueError(
            f"uses name {', '.join(sorted(uses)[:8])}, and the parameters are "
            f"{', '.join(sorted(paths)[:8])}: call uses(fn, params, *args) with the same tree"
        )
