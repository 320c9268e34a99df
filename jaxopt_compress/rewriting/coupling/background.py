"""Whether a masked function equals the function without the masked indices.

Parameters are zero where indices are removed. This module follows which constant, if any, each
value then has at the removed indices of each of its axes (its background): ``relu(0) = 0``,
``exp(0) = 1``, and so on. The removal is exact if all that is summed over removed indices is 0
there, and likewise for other reductions.

Where there is no constant, a value may still be the same at all removed indices, as ``x - mean(x)``
is in a layer norm (a lane). Its sum over them is one of them times their number, which the replay
adds (`lanes`).

Numbers whose value is not known are taken for finite, and denominators for different from 0.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
from jax.extend import core

from jaxopt_compress.rewriting.coupling import constants
from jaxopt_compress.rewriting.coupling.constants import LANE, Carried, Known, apply
from jaxopt_compress.rewriting.coupling.elementwise import ELEMENTWISE
from jaxopt_compress.rewriting.coupling.equations import Body, Node
from jaxopt_compress.rewriting.coupling.graph import Axes, Axis
from jaxopt_compress.rewriting.coupling.replay import Kept
from jaxopt_compress.typing import Value


class Background(NamedTuple):
    """What is known of a value of the masked function; None where nothing is.

    Attributes:
        axes: Per axis, its constant wherever the index along this axis is removed; or `LANE`.
        everywhere: Its constant at all indices.
    """

    axes: tuple[Known, ...]
    everywhere: Known = None


Fills = dict[Body, dict[core.Var, set[int]]]


class Walk(NamedTuple):
    """What rules for backgrounds share: which indices are left, and what was found inexact."""

    kept: Kept
    inexact: list[str]
    every: bool = False  # whether operations that meet whole values only are followed too
    seen: dict[Node, list[Background]] | None = None  # operands' backgrounds; None without lanes
    values: dict[Body, dict[core.Var, Background]] | None = (
        None  # those of all values, if asked for
    )
    fills: Fills | None = None  # which values are -inf where indices go; None if none may be
    body: Body | None = None  # the one that is walked

    def shrinks(self, *axes: Axis) -> bool:
        """Whether one of some axes loses an index."""
        return self.kept.shrinks(axes)

    def chosen(self, node: Node, b: Background, k: int) -> Known:
        """The constant among which a maximum chooses: -inf where what is chosen from is filled."""
        value = b.axes[k]
        if value is not None and value is not LANE and bool(value == -np.inf):
            return value
        v = node.eqn.invars[0]
        if self.fills is None or self.body is None or isinstance(v, core.Literal):
            return value
        self.fills.setdefault(self.body, {}).setdefault(v, set()).add(k)
        return MINUS_INFINITY

    def reduced(self, node: Node, exact: bool, what: str) -> None:
        """Notes a reduction over removed indices."""
        if not exact:
            self.inexact.append(f"{node.where()} {what}")


LANED = ELEMENTWISE | {"broadcast_in_dim", "transpose", "squeeze"}
Rule = Callable[[Walk, Node, list[Background]], list[Background]]
RULES: dict[str, Rule] = {}
# These are followed even where nothing is removed: they make the constants that others meet.
_UNIFORM = frozenset({"broadcast_in_dim", "convert_element_type", "copy", "neg"})
ZERO, NAN, MINUS_INFINITY = np.float32(0), np.float32(np.nan), np.float32(-np.inf)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the backgrounds of primitives' results; those without a rule are unknown."""

    def register(one: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, one))
        return one

    return register


def unknown(axes: Axes) -> Background:
    """The background of a value about which nothing is known."""
    return Background((None,) * len(axes))


def uniform(axes: Axes, value: Known) -> Background:
    """The background of a value that is one constant at all indices, or that a loop carries."""
    own = None if isinstance(value, Carried) else value
    return Background((own,) * len(axes), value)


def constant(b: Background) -> Known:
    """The constant at all indices, but not what a loop carries, since entries are moved."""
    return None if isinstance(b.everywhere, Carried) else b.everywhere


def without_lanes(b: Background) -> Background:
    """Where lanes end: at operations that do not hand them on."""
    return b._replace(axes=tuple(None if v is LANE else v for v in b.axes))


def backgrounds(body: Body, walk: Walk, ins: Sequence[Background]) -> list[Background]:
    """The backgrounds of a function's results."""
    jaxpr, walk = body.jaxpr, walk._replace(body=body)
    filled = (walk.fills or {}).get(body, {})
    env = dict(zip(jaxpr.constvars, map(_of_array, body.constants), strict=True))
    env.update((v, _filled(b, filled.get(v))) for v, b in zip(jaxpr.invars, ins, strict=True))

    def read(v: Value) -> Background:
        return _of_array(v.val) if isinstance(v, core.Literal) else env[v]

    for node in body.nodes:
        follows = walk.every or node.name in _UNIFORM or walk.kept.touches(node)
        if node.name in RULES and follows:
            ins = [read(v) for v in node.eqn.invars]
            if walk.seen is not None:
                walk.seen[node] = ins
            results = RULES[node.name](walk, node, ins)
            if node.name not in LANED or walk.seen is None:
                results = list(map(without_lanes, results))
        else:
            results = list(map(unknown, node.outs))
        pairs = zip(node.eqn.outvars, results, strict=True)
        env.update((v, _filled(b, filled.get(v))) for v, b in pairs)
    if walk.values is not None:
        walk.values[body] = env
    return [read(v) for v in jaxpr.outvars]


def _filled(b: Background, axes: Collection[int] | None) -> Background:
    """With -inf where indices of some axes are removed."""
    if not axes:
        return b
    return Background(tuple(MINUS_INFINITY if k in axes else v for k, v in enumerate(b.axes)))


def _of_array(x: Value) -> Background:
    """A constant array: that its entries are all equal is seen up to some size."""
    rank = np.ndim(x)
    if not hasattr(x, "dtype") or not 0 < np.size(x) <= 2**20 or constants.no_numbers(x):
        return Background((None,) * rank)
    entries = np.asarray(x).reshape(-1)
    value = entries[0] if (entries == entries[0]).all() else None
    return Background((value,) * rank, value)


def same(values: Sequence[Value]) -> Known:
    """The constant that all of some are; NaN if one is NaN; else None."""
    if any(constants.is_infinite(v) and np.isnan(v) for v in values):
        return NAN
    first = values[0] if values else None
    if (
        first is None
        or any(v is LANE for v in values)
        or any(v is None or v != first for v in values)
    ):
        return None
    return first


@rule(*ELEMENTWISE)
def _elementwise(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    out = node.outs[0]
    everywhere = apply(node, [b.everywhere for b in ins])
    if everywhere is not None:
        return [uniform(out, everywhere)]

    def at(k: int) -> Known:
        # A scalar, or an axis of length 1, is one entry for removed and other indices alike.
        def own(axes: Axes, b: Background) -> Known:
            if axes and len(axes[k]) == len(out[k]):
                return b.axes[k]
            return LANE if constant(b) is None else constant(b)

        if not walk.shrinks(out[k]):
            return None
        values = list(map(own, node.ins, ins))
        known = apply(node, [None if v is LANE else v for v in values])
        return LANE if known is None and all(v is not None for v in values) else known

    return [Background(tuple(map(at, range(len(out)))))]


@rule("optimization_barrier")
def _barrier(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    del walk, node
    return ins


@rule("broadcast_in_dim")
def _broadcast(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    del walk
    everywhere, value = ins[0].everywhere, constant(ins[0])
    out: list[Known] = [LANE if value is None else value] * len(node.outs[0])
    for i, k in enumerate(node.params["broadcast_dimensions"]):
        if len(node.ins[0][i]) == len(node.outs[0][k]):
            out[k] = ins[0].axes[i]
    return [Background(tuple(out), everywhere)]


@rule("transpose")
def _transpose(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    del walk
    own = ins[0].axes
    return [Background(tuple(own[i] for i in node.params["permutation"]), constant(ins[0]))]


@rule("squeeze")
def _squeeze(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    del walk
    gone, (own, everywhere) = node.params["dimensions"], ins[0]
    return [Background(tuple(v for i, v in enumerate(own) if i not in gone), everywhere)]


@rule("reshape")
def _reshape(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    """Axes that are only moved keep their constants; others share those of all others."""
    own = {id(a): v for a, v in zip(node.ins[0], ins[0].axes, strict=True)}
    moved = {id(a) for a in node.outs[0]} & set(own)
    mixed = [own[id(a)] for a in node.ins[0] if id(a) not in moved and walk.shrinks(a)]
    at = lambda a: own[id(a)] if id(a) in moved else same(mixed)
    return [Background(tuple(map(at, node.outs[0])), ins[0].everywhere)]


@rule("slice", "rev", "split", "dynamic_slice", "copy_p", "reduce_window_max", "reduce_window_min")
def _in_place(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    del walk
    return [Background(ins[0].axes, constant(ins[0]))] * len(node.outs)


@rule("sort")
def _sort(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    del walk
    one = Background(ins[0].axes, constant(ins[0]))
    return [one] if len(ins) == 1 else list(map(unknown, node.outs))


def _joint(walk: Walk, parts: list[tuple[Axes, Background]]) -> Background:
    """The background of entries of which each comes from one of some values."""
    ranks = range(len(parts[0][0]))
    at = lambda k: same([b.axes[k] for axes, b in parts if walk.shrinks(axes[k])])
    return Background(tuple(map(at, ranks)), same([constant(b) for _, b in parts]))


@rule("concatenate", "dynamic_update_slice")
def _joined(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    parts = list(zip(node.ins, ins, strict=True))
    return [_joint(walk, parts if node.name == "concatenate" else parts[:2])]


@rule("pad")
def _pad(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    """Where another axis is padded, removed indices have the padding's value too."""
    del walk
    padded = [config != (0, 0, 0) for config in map(tuple, node.params["padding_config"])]
    other = lambda k: any(p for i, p in enumerate(padded) if i != k)
    at = lambda k, v: same([v, constant(ins[1])]) if other(k) else v
    return [Background(tuple(at(k, v) for k, v in enumerate(ins[0].axes)))]
