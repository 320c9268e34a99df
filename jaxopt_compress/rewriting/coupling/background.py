"""Whether a masked function equals the function without the masked indices.

Parameters are zero where indices are removed. This module follows which constant, if any, each
value then has at these indices (its background): ``relu(0) = 0``, ``exp(0) = 1``, and so on. The
removal is exact if all that is summed over removed indices is 0 there, and likewise for other
reductions.

Numbers whose value is not known are taken for finite, and denominators for different from 0.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.rewriting.coupling.constants import apply, is_infinite, is_zero
from jaxopt_compress.rewriting.coupling.elementwise import ELEMENTWISE, REDUCTIONS
from jaxopt_compress.rewriting.coupling.equations import Body, Node
from jaxopt_compress.rewriting.coupling.replay import Kept


class Background(NamedTuple):
    """What is known of a value of the masked function; None if nothing is.

    Attributes:
        removed: Its constant at all removed indices.
        everywhere: Its constant at all indices.
    """

    removed: Any = None
    everywhere: Any = None


# These are followed even where nothing is removed: they make the constants that others meet.
_UNIFORM = frozenset({"broadcast_in_dim", "convert_element_type", "copy", "neg"})

UNKNOWN = Background()
ZERO, NAN = Background(np.float32(0)), Background(np.float32(np.nan))


class Walk(NamedTuple):
    """What rules for backgrounds share: which indices are left, and what was found inexact."""

    kept: Kept
    inexact: list[str]

    def shrinks(self, *axes: Any) -> bool:
        """Whether one of some axes loses an index."""
        return self.kept.shrinks(axes)

    def reduced(self, node: Node, exact: bool, what: str) -> None:
        """Notes a reduction over removed indices."""
        if not exact:
            self.inexact.append(f"{node.where()} {what}")


Rule = Callable[[Walk, Node, list[Background]], list[Background]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the backgrounds of primitives' results; those without a rule are unknown."""

    def register(one: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, one))
        return one

    return register


def inexact_reductions(body: Body, kept: Kept, masked: Sequence[bool]) -> list[str]:
    """The operations for which masking differs from removing, as errors name them.

    Args:
        body: A function.
        kept: Which indices are left.
        masked: For each argument, whether it is 0 where indices are removed.
    """
    walk = Walk(kept, [])
    backgrounds(body, walk, [ZERO if m else UNKNOWN for m in masked])
    return list(dict.fromkeys(walk.inexact))


def backgrounds(body: Body, walk: Walk, ins: Sequence[Background]) -> list[Background]:
    """The backgrounds of a function's results."""
    jaxpr = body.jaxpr
    env = dict(zip(jaxpr.constvars, map(_of_array, body.constants), strict=True))
    env.update(zip(jaxpr.invars, ins, strict=True))

    def read(v: Any) -> Background:
        return _of_array(v.val) if isinstance(v, core.Literal) else env[v]

    for node in body.nodes:
        found = [read(v) for v in node.eqn.invars]
        results = [UNKNOWN] * len(node.outs)
        if node.name in RULES and (walk.kept.touches(node) or node.name in _UNIFORM):
            results = RULES[node.name](walk, node, found)
        env.update(zip(node.eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _of_array(x: Any) -> Background:
    """A constant array: that its entries are all equal is seen up to some size."""
    if not hasattr(x, "dtype") or not 0 < np.size(x) <= 2**20 or _no_numbers(x):
        return UNKNOWN
    entries = np.asarray(x).reshape(-1)
    return Background(*[entries[0]] * 2) if (entries == entries[0]).all() else UNKNOWN


def _no_numbers(x: Any) -> bool:
    """Whether it is a tracer, spread over processes, or made of keys."""
    if isinstance(x, (np.ndarray, np.generic)):
        return False
    keys = jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
    return keys or not isinstance(x, jax.Array) or is_traced(x) or not x.is_fully_addressable


def same(values: Sequence[Any]) -> Any:
    """The constant that all of some are, or None."""
    first = values[0] if values else None
    if first is None or any(v is None or v != first for v in values):
        return None
    return first


@rule(*ELEMENTWISE)
def _elementwise(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    out = node.outs[0]
    everywhere = apply(node, [b.everywhere for b in ins])
    if everywhere is not None:
        return [Background(everywhere, everywhere)]

    def at_removed(axes: Any, found: Background) -> Any:
        # A scalar, or an axis of length 1, is one entry for removed and other indices alike.
        stretched = not axes or any(
            len(a) != len(b) and walk.shrinks(b) for a, b in zip(axes, out, strict=True)
        )
        return found.everywhere if stretched else found.removed

    return [Background(apply(node, list(map(at_removed, node.ins, ins))))]


@rule("optimization_barrier")
def _barrier(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    del walk, node
    return ins


@rule("broadcast_in_dim")
def _broadcast(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    own = {id(a) for a in node.ins[0]}
    stretched = walk.shrinks(*(a for a in node.outs[0] if id(a) not in own))
    everywhere = ins[0].everywhere
    return [Background(everywhere if stretched else ins[0].removed, everywhere)]


@rule("transpose", "reshape", "squeeze", "slice", "rev", "split", "dynamic_slice", "sort", "copy_p")
def _moved(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    del walk
    return [ins[0] if len(node.ins) == 1 or node.name == "dynamic_slice" else UNKNOWN] * len(
        node.outs
    )


@rule("gather")
def _gather(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    # Indices that are removed themselves look up entries that are left.
    return [UNKNOWN if walk.shrinks(*node.ins[1]) else Background(ins[0].removed)]


@rule("concatenate", "dynamic_update_slice")
def _joined(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    parts = list(zip(node.ins, ins, strict=True))
    parts = parts if node.name == "concatenate" else parts[:2]
    shrinking = [b.removed for axes, b in parts if walk.shrinks(*axes)]
    return [Background(same(shrinking), same([b.everywhere for _, b in parts]))]


@rule("scatter", "scatter-add", "scatter_add", "scatter_mul", "scatter_min", "scatter_max")
def _scatter(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    operand, indices, updates = node.ins
    if walk.shrinks(*indices):
        walk.reduced(node, False, "writes entries whose indices go")
    shrinking = [b.removed for a, b in ((operand, ins[0]), (updates, ins[2])) if walk.shrinks(*a)]
    zero = [is_zero(x) for x in shrinking]
    keeps = node.name != "scatter" and all(zero)
    return [Background(same(shrinking)) if node.name == "scatter" else ZERO if keeps else UNKNOWN]


@rule("pad")
def _pad(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    del walk, node
    return [Background(same([ins[0].removed, ins[1].everywhere]))]


_NEUTRAL = {
    "reduce_sum": 0, "reduce_prod": 1, "reduce_and": 1, "reduce_or": 0, "reduce_xor": 0,
    "reduce_max": -np.inf, "reduce_min": np.inf,
}  # fmt: skip


@rule(*REDUCTIONS)
def _reduce(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    value, axes = ins[0].removed, [node.ins[0][i] for i in node.params["axes"]]
    if walk.shrinks(*axes):
        neutral = value is not None and bool(value == _NEUTRAL[node.name])
        known = "" if value is None else f": they are {value}"
        walk.reduced(
            node, neutral, f"reduces over entries that are not neutral where indices go{known}"
        )
    if value is None:
        return [UNKNOWN]
    if node.name == "reduce_sum":
        value = value * np.prod([len(a) for a in axes], dtype=value.dtype)
    elif node.name not in ("reduce_max", "reduce_min") and value != _NEUTRAL[node.name]:
        return [UNKNOWN]
    return [Background(value)]


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    del walk
    zero = node.name in ("cumsum", "cummax", "cummin") and is_zero(ins[0].removed)
    return [Background(ins[0].removed) if zero else UNKNOWN]


_NO_ZEROS = "sums products that are not 0 where indices go"


@rule("dot_general")
def _dot(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    (lc, rc), (lb, rb) = node.params["dimension_numbers"]
    left, right = node.ins
    zero = is_zero(ins[0].removed), is_zero(ins[1].removed)
    poison = is_infinite(ins[0].removed) or is_infinite(ins[1].removed)
    free = lambda axes, used: [a for i, a in enumerate(axes) if i not in used]
    if walk.shrinks(*(left[i] for i in lc)):
        walk.reduced(node, any(zero) and not poison, _NO_ZEROS)
    ok = (
        (any(zero) or not walk.shrinks(*(left[i] for i in lb)))
        and (zero[0] or not walk.shrinks(*free(left, (*lc, *lb))))
        and (zero[1] or not walk.shrinks(*free(right, (*rc, *rb))))
    )
    return [NAN if poison else ZERO if ok else UNKNOWN]


@rule("conv_general_dilated")
def _conv(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    numbers, (x, w) = node.params["dimension_numbers"], node.ins
    zero = is_zero(ins[0].removed), is_zero(ins[1].removed)
    poison = is_infinite(ins[0].removed) or is_infinite(ins[1].removed)
    batch, features = (x[k] for k in numbers.lhs_spec[:2])
    out, inner = (w[k] for k in numbers.rhs_spec[:2])
    grouped = node.params["feature_group_count"] > 1
    if walk.shrinks(inner if grouped else features):
        walk.reduced(node, any(zero) and not poison, _NO_ZEROS)
    # The outputs of a removed group meet nothing but its inputs and its weights.
    channels = zero[1] or (
        grouped and zero[0] and walk.shrinks(features) and not walk.shrinks(inner)
    )
    ok = (channels or not walk.shrinks(out)) and (zero[0] or not walk.shrinks(batch))
    return [NAN if poison else ZERO if ok else UNKNOWN]


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _window(walk: Walk, node: Node, ins: list[Background]) -> list[Background]:
    del walk
    if node.name == "reduce_window_sum":
        return [Background(ins[0].removed) if is_zero(ins[0].removed) else UNKNOWN]
    return [Background(ins[0].removed)]
