"""The smallest sets of indices that can be removed, and those that are alike as groups."""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from jaxopt_compress.rewriting.coupling.analysis import Analysis, first_uses
from jaxopt_compress.rewriting.coupling.coupling import NotRemovable

Slot = tuple[str, int]  # a parameter's path, and one of its axes


class Member(NamedTuple):
    """An axis of a parameter that shrinks with a group.

    Attributes:
        path: The parameter.
        axis: The axis, counted from the front.
        indices: Those of each unit, ``[units, count]``.
    """

    path: str
    axis: int
    indices: np.ndarray


class Units(NamedTuple):
    """Units that touch the same axes, each the same number of indices.

    Attributes:
        name: Path and axis of the member that names the group.
        seeds: Per unit, components from which all that goes with it follows.
        members: The axes that shrink, in the order in which the function reads the parameters.
    """

    name: str
    seeds: list[tuple[int, ...]]
    members: list[Member]


def find_units(analysis: Analysis) -> list[Units]:
    """All groups of at least two units, of which none would empty an axis."""
    slots, slot_of, index_of, start = _touched(analysis)
    alike: dict[tuple[tuple[int, int], ...], list] = defaultdict(list)
    for components in _candidates(analysis, start):
        own = np.concatenate([np.arange(start[c], start[c + 1]) for c in components])
        at, counts = np.unique(slot_of[own], return_counts=True)
        lengths = [len(analysis.params[slots[s][0]][slots[s][1]]) for s in at]
        if len(own) and (counts < lengths).all():
            signature = tuple(zip(at.tolist(), counts.tolist(), strict=True))
            alike[signature].append((components, own))
    order = {path: i for i, path in enumerate(first_uses(analysis))}
    found = []
    for signature, units in alike.items():
        if len(units) > 1:
            members = []
            for slot, count in signature:
                rows = [index_of[own[slot_of[own] == slot]] for _, own in units]
                members.append(Member(*slots[slot], np.sort(np.reshape(rows, (-1, count)), axis=1)))
            members.sort(key=lambda m: (order[m.path], m.axis))
            # By the index at which a unit comes first in what names the group.
            name = _naming(analysis, members)
            by = np.argsort(name.indices[:, 0], kind="stable")
            members = [m._replace(indices=m.indices[by]) for m in members]
            seeds = [tuple(units[i][0]) for i in by]
            found.append(Units(f"{name.path}:{name.axis}", seeds, members))
    found.sort(key=lambda u: (order[u.members[0].path], u.members[0].axis, len(u.seeds)))
    return _named_apart(found)


def _touched(analysis: Analysis) -> tuple[list[Slot], np.ndarray, np.ndarray, np.ndarray]:
    """Slots; and per index of a slot, in the order of components, its slot and its number.

    The entries of component ``c`` are those from ``start[c]`` to ``start[c + 1]``.
    """
    component = analysis.coupling.component
    slots = [(path, k) for path, axes in analysis.params.items() for k in range(len(axes))]
    axes = [analysis.params[path][k] for path, k in slots]
    owner = np.concatenate([component[a] for a in axes] or [np.zeros(0, int)])
    slot = np.repeat(np.arange(len(slots)), [len(a) for a in axes])
    index = np.concatenate([np.arange(len(a)) for a in axes] or [np.zeros(0, int)])
    order = np.argsort(owner, kind="stable")
    start = np.searchsorted(owner[order], np.arange(analysis.coupling.count + 1))
    return slots, slot[order], index[order], start


def _candidates(analysis: Analysis, start: np.ndarray) -> list[list[int]]:
    """Sets of components that can go, each minimal and once, and that touch a parameter."""
    coupling = analysis.coupling
    found: dict[tuple[int, ...], None] = {}
    for seed in coupling.seeds().tolist():
        if not coupling.in_product(seed):
            found[(seed,)] = None
            continue
        try:
            found[tuple(np.flatnonzero(coupling.close([seed])).tolist())] = None
        except NotRemovable:
            continue
    touches = np.diff(start) > 0
    return [list(key) for key in found if touches[list(key)].any()]


def _naming(analysis: Analysis, members: list[Member]) -> Member:
    """The member after which a group is called: a matrix, with as few indices per unit as any."""
    fewest = min(m.indices.shape[1] for m in members)
    few = [m for m in members if m.indices.shape[1] == fewest]
    return next((m for m in few if len(analysis.params[m.path]) > 1), few[0])


def _named_apart(found: list[Units]) -> list[Units]:
    """Groups that share what names them get numbers: ``w:1``, ``w:1.2``."""
    seen: dict[str, int] = defaultdict(int)
    out = []
    for units in found:
        seen[units.name] += 1
        n = seen[units.name]
        out.append(units._replace(name=units.name if n == 1 else f"{units.name}.{n}"))
    return out
