"""Whether removing indices is the same as masking them, and what else it is the same as."""

from collections.abc import Collection, Sequence

from jaxopt_compress.rewriting.coupling.background import (
    ZERO,
    Background,
    Fills,
    Walk,
    backgrounds,
    uniform,
)
from jaxopt_compress.rewriting.coupling.equations import Body, Node
from jaxopt_compress.rewriting.coupling.replay import Kept


def inexact_reductions(
    body: Body,
    kept: Kept,
    masked: Sequence[bool],
    emptied: Collection[int] = (),
    skip: bool = False,
) -> list[str]:
    """The operations for which masking differs from removing, as errors name them.

    Args:
        body: A function.
        kept: Which indices are left.
        masked: For each argument, whether it is 0 where indices are removed.
        emptied: The numbers of arguments that are 0 everywhere.
        skip: Whether what a maximum chooses from is -inf where indices are removed.
    """
    return list(dict.fromkeys(_walked(body, kept, masked, emptied, skip).inexact))


def fills_of(body: Body, kept: Kept, masked: Sequence[bool], emptied: Collection[int]) -> Fills:
    """The values that a maximum chooses from, and their axes that lose indices."""
    return _walked(body, kept, masked, emptied, True).fills or {}


def operands_of(
    body: Body,
    kept: Kept,
    masked: Sequence[bool],
    emptied: Collection[int] = (),
    skip: bool = False,
) -> dict[Node, list[Background]]:
    """What is known of the operands of each equation that may have lanes, as above."""
    return _walked(body, kept, masked, emptied, skip).seen or {}


def _walked(
    body: Body, kept: Kept, masked: Sequence[bool], emptied: Collection[int], skip: bool = False
) -> Walk:
    start = [
        uniform(a, ZERO) if i in emptied else Background((ZERO if m else None,) * len(a))
        for i, (a, m) in enumerate(zip(body.ins, masked, strict=True))
    ]
    every = bool(emptied)
    fills: Fills | None = {} if skip else None
    count = lambda: sum(len(axes) for own in (fills or {}).values() for axes in own.values())
    while True:
        before = count()
        walk = Walk(kept, [], every, seen={}, fills=fills)
        backgrounds(body, walk, start)
        if count() == before:
            break
    if walk.inexact:
        # Who removes entries of a softmax nevertheless wants no share of theirs in its sum.
        walk = Walk(kept, [], every, fills=fills)
        backgrounds(body, walk, start)
    return walk
