"""How a function uses each of its parameters."""

import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from jaxopt_compress.lift.interpreter import Fallback
from jaxopt_compress.lift.observe.meetings import Meeting
from jaxopt_compress.lift.observe.observed import observed_call
from jaxopt_compress.lift.observe.tape import Tape
from jaxopt_compress.tree import Layout, assume_layout
from jaxopt_compress.tree.paths import is_float, named_leaves
from jaxopt_compress.typing import PyTree, Value


class UnfollowedWarning(UserWarning):
    """A matrix goes into an operation that uses do not follow, and no use of it is found."""


class Use(NamedTuple):
    """One way in which a parameter meets the data; axes are the parameter's own, negative.

    Attributes:
        op: The primitive: ``"dot_general"``, ``"conv_general_dilated"``, ``"gather"`` and so on.
        contracting: Axes that are summed over.
        output: Axes that appear in the result.
        stack: Axes that a scan or an index runs over.
        batch: Axes that the activation shares, such as experts.
        gathered: Axes along which entries are looked up.
        flops: Floating operations per call of the function; None where a loop's length is unknown.
        count: How often each slice of the stack is used per call; None where it is unknown.
        source: The line of the function.
    """

    op: str
    contracting: tuple[int, ...]
    output: tuple[int, ...]
    stack: tuple[int, ...]
    batch: tuple[int, ...]
    gathered: tuple[int, ...]
    flops: int | None
    count: float | None
    source: str


Uses: TypeAlias = Mapping[str, Sequence[Use]]
"""The result of `uses`: the uses of each parameter, by path."""


def uses(
    fn: Callable[..., PyTree], params: PyTree, *args: PyTree, **kwargs: Any
) -> dict[str, list[Use]]:
    """Finds how ``fn(params, *args, **kwargs)`` uses each floating parameter.

    Nothing is computed: arrays may be `jax.ShapeDtypeStruct`.

    Args:
        fn: Any JAX function.
        params: A pytree; its leaves of rank 2 and more are followed.
        *args: The other arguments.
        **kwargs: Likewise.

    Returns:
        Path -> its uses, one per distinct way, in the order in which the function first meets them;
        an empty list if the parameter meets no product, convolution or lookup. An
        `UnfollowedWarning` names matrices that may do so behind an operation that is not followed.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> use = jc.uses(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 3))}, jnp.ones((2, 8)))["w"][
        ...     0
        ... ]
        >>> use.op, use.contracting, use.output, use.flops
        ('dot_general', (-2,), (-1,), 96)
    """
    found: dict[str, dict[Hashable, Use]] = {p: {} for p, w in named_leaves(params) if followed(w)}

    def observe(tape: Tape, meeting: Meeting) -> None:
        found[meeting.path][meeting.place] = _use(tape, meeting)

    lost: list[Fallback] = []

    def run(params: PyTree, args: tuple, kwargs: dict) -> PyTree:
        return observed_call(fn, Tape(observe), found, params, args, kwargs, lost)

    _abstract_call(run, params, args, kwargs)
    _warn_of_unfollowed(params, found, lost)
    return {path: _merge(list(each.values())) for path, each in found.items()}


# A parameter that is added to an activation, or is one itself, is not a weight.
_NO_WEIGHT = frozenset(
    "add sub mul div max min pow rem select_n add_any atan2 nextafter eq ne lt le gt ge and or xor "
    "stop_gradient convert_element_type broadcast_in_dim dot_general ragged_dot ragged_dot_general "
    "conv_general_dilated".split()
)


def _warn_of_unfollowed(
    params: PyTree, found: Mapping[str, Mapping[Hashable, Use]], lost: Sequence[Fallback]
) -> None:
    """Names matrices without a use that were lost on the way to a product."""
    first: dict[str, str] = {}
    for path, leaf in named_leaves(params):
        events = [e for e in lost if e.path == path and e.primitive not in _NO_WEIGHT]
        if found.get(path) or not events or sum(n > 1 for n in leaf.shape) < 2:
            continue
        first[path] = f"{path!r} at {events[0].primitive}, {events[0].source}"
    if first:
        more = f", and {len(first) - 8} more" if len(first) > 8 else ""
        warnings.warn(
            f"uses lost {'; '.join(list(first.values())[:8])}{more}: whatever product comes behind "
            "is not seen, so that by default they stay dense; name them in where= to compress them",
            UnfollowedWarning,
            stacklevel=3,
        )


def uses_by_layout(params: PyTree, layout: str) -> dict[str, list[Use]]:
    """A stand-in for uses, where all kernels have the same layout.

    Args:
        params: A pytree.
        layout: ``"in,out"``, as Flax writes kernels, or ``"out,in"``, as PyTorch and Equinox do.

    Returns:
        Path -> one use, for each floating leaf of rank 2 and more.
    """
    found = {}
    for path, leaf in named_leaves(params):
        if followed(leaf):
            own = assume_layout(tuple(leaf.shape), layout)
            use = Use("assumed", own.contracting, own.output, own.stack, (), (), None, None, "")
            found[path] = [use]
    return found


def _abstract_call(run: Callable[..., PyTree], params: PyTree, args: tuple, kwargs: dict) -> None:
    """Traces ``run``; anything but arrays stays a static argument."""
    leaves, treedef = jax.tree.flatten((params, args, kwargs))
    arrays = [i for i, x in enumerate(leaves) if hasattr(x, "shape")]

    def body(*values: Value) -> None:
        full = list(leaves)
        for i, value in zip(arrays, values, strict=True):
            full[i] = value
        run(*jax.tree.unflatten(treedef, full))

    jax.eval_shape(body, *(leaves[i] for i in arrays))


def followed(leaf: Value) -> bool:
    """Whether a leaf is a parameter whose axes are followed."""
    return is_float(leaf) and len(leaf.shape) >= 2


def _use(tape: Tape, meeting: Meeting) -> Use:
    contracting, output, batch, gathered, stack = meeting.roles
    lengths = [loop.length for loop in tape.loops]
    known = [n for n in lengths if n is not None]
    runs = math.prod(known) if len(known) == len(lengths) else None
    share = math.prod(meeting.shape[d] for d in stack)
    # A stack may be empty.
    entries = math.prod(meeting.shape) / max(share, 1)
    # Each entry that was looked up is one more operand.
    own = meeting.size if meeting.looked_up else min(entries, meeting.size)
    flops = None if runs is None else 0
    if runs is not None and meeting.op != "gather":
        flops = round(2 * own * meeting.rows * runs)
    looked_up = meeting.size / max(entries, 1) if meeting.looked_up else 1
    count = None if runs is None else runs * looked_up / max(share, 1)
    roles = (contracting, output, stack, batch, gathered)
    return Use(meeting.op, *roles, flops, count, meeting.source)


def _merge(found: list[Use]) -> list[Use]:
    """Uses that differ in place and number only become one."""
    merged: dict[Use, Use] = {}
    for use in found:
        key = use._replace(flops=None, count=None, source="")
        if key in merged:
            old = merged[key]
            add = lambda a, b: None if a is None or b is None else a + b
            use = old._replace(flops=add(old.flops, use.flops), count=add(old.count, use.count))
        merged[key] = use
    return list(merged.values())


def layout_of(found: Sequence[Use]) -> Layout | None:
    """The layout that serves the uses of one parameter; None if there are none.

    A product decides before a lookup: a tied embedding gets its scales along the axis that the
    product sums over, and a table that is only looked up one scale per row.
    """
    if not found:
        return None
    use = max(found, key=lambda u: (u.op != "gather", u.flops or 0))
    stack = tuple(sorted((*use.stack, *use.batch)))
    if use.op == "gather":
        # A looked-up entry has its features behind the axis looked up, if any; what lies
        # before it are tables of their own, such as those of an ensemble.
        behind = tuple(d for d in use.output if d > min(use.gathered, default=0))
        before = tuple(d for d in use.output if d not in behind) if behind else ()
        contracting = behind or use.output
        return Layout(contracting, use.gathered, tuple(sorted((*stack, *before))))
    return Layout(use.contracting, use.output, stack)
