"""Residual blocks as units: the parameters of ``f`` of a sum ``x + f(x)`` go as a whole."""

from jaxopt_compress.removal.budget import total_flops, work_of
from jaxopt_compress.removal.group import Group
from jaxopt_compress.rewriting.coupling.analysis import Analysis, Frame, chosen
from jaxopt_compress.rewriting.coupling.blocks import residual_blocks
from jaxopt_compress.rewriting.coupling.coupling import NotRemovable
from jaxopt_compress.rewriting.coupling.skips import kept_without
from jaxopt_compress.tree import named_leaves
from jaxopt_compress.tree.paths import is_float
from jaxopt_compress.typing import PyTree

NAME = "blocks"


def block_group(found: Analysis, params: PyTree, frame: Frame, total: int) -> Group | None:
    """The residual blocks of a function that are written out; None if there are none.

    A block is one if, with its parameters 0, its sum hands on what it gets, and products are saved.
    Scalars of it, such as a gate, stay and are no longer read.
    """
    whole = {
        path
        for path, x in named_leaves(params)
        if is_float(x) and len(x.shape) and 0 not in x.shape
    }
    free = {path for path in whole if not chosen(frame.protect, path)}
    ends = [not chosen(frame.follow, name) for name in found.outputs]
    blocks, saved = [], []
    for paths in residual_blocks(found, free, ends):
        try:
            kept = kept_without(found, [], paths)
        except NotRemovable:
            continue
        less = total - total_flops(work_of(found.body, kept))
        if less and any(skipped.forward for skipped in kept.skips.values()):
            blocks.append(tuple(path for path in found.params if path in paths))
            saved.append(less)
    if not blocks:
        return None
    seeds: list[tuple[int, ...]] = [()] * len(blocks)
    return Group(NAME, seeds, [], (), min(saved), 0, True, tuple(blocks))
