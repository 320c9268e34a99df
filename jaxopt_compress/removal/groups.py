"""Groups of units that can be removed from a function's parameters."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxopt_compress.lift import Uses
from jaxopt_compress.removal.blocks import block_group
from jaxopt_compress.removal.budget import (
    Offer,
    afford,
    check_round_to,
    checked_scores,
    total_flops,
    unit_multiple,
    work_of,
)
from jaxopt_compress.removal.group import Group
from jaxopt_compress.removal.plan import Plan, gone_from_kept
from jaxopt_compress.removal.scored import ScoredGroups
from jaxopt_compress.removal.units import Units, find_units
from jaxopt_compress.rewriting.coupling.analysis import Analysis, Frame, emptied, seeds_of
from jaxopt_compress.rewriting.coupling.coupling import NotRemovable
from jaxopt_compress.rewriting.coupling.exactness import inexact_reductions
from jaxopt_compress.rewriting.coupling.replay import Gone, Kept
from jaxopt_compress.rewriting.coupling.skips import kept_without, numbers
from jaxopt_compress.tree import named_leaves
from jaxopt_compress.tree.budgets import Flops
from jaxopt_compress.tree.paths import is_float
from jaxopt_compress.typing import PyTree


class Groups(ScoredGroups):
    """The groups of a function's parameters, by their names.

    Made by `find_groups`.
    """

    def __init__(
        self,
        fn: Callable[..., PyTree],
        params: PyTree,
        analysis: Analysis,
        frame: Frame,
        observe: Callable[[], Uses],
    ):
        self.fn, self.params, self.frame, self.observe = fn, params, frame, observe
        self._analysis = analysis
        self._axes = analysis.body.every_axis()
        self._work = work_of(analysis.body, self._kept([]))
        self._total = total_flops(self._work)
        leads = [node.notes["lead"] for node in analysis.body.walk() if node.name == "scan"]
        self._steps = {x for axis in leads for x in analysis.coupling.component[axis].tolist()}
        self._groups = {units.name: self._group(units) for units in find_units(analysis)}
        blocks = block_group(analysis, params, frame, self._total)
        if blocks is not None:
            self._groups[blocks.name] = blocks

    def __getitem__(self, name: str) -> Group:
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __repr__(self) -> str:
        return f"<Groups {list(self)}>"

    def table(self) -> str:
        """All groups: how many units, whether their removal is exact, and which axes shrink."""
        return "\n".join(group.describe() for group in self.values())

    def why(self, path: str, axis: int) -> str:
        """Why indices of an axis can be removed or cannot, and what goes with them.

        Args:
            path: A parameter.
            axis: One of its axes.

        Raises:
            ValueError: There is no such parameter, or no such axis.
        """
        if path not in self._analysis.params:
            known = ", ".join(self._analysis.params)
            raise ValueError(f"there is no parameter {path!r}; there are {known}")
        axes = self._analysis.params[path]
        if not -len(axes) <= axis < len(axes):
            raise ValueError(f"{path!r} of shape {tuple(map(len, axes))} has no axis {axis}")
        axis %= len(axes)
        found = [
            f"its indices are units of {group.name!r}, with {group.others(path, axis)}"
            for group in self.values()
            if any((m.path, m.axis) == (path, axis) for m in group.members)
        ]
        found += [
            f"it goes as a whole with unit {i} of {group.name!r}"
            for group in self.values()
            for i, whole in enumerate(group.paths)
            if path in whole
        ]
        coupling = self._analysis.coupling
        own = coupling.component[axes[axis]]
        stay = own[coupling.kept[own]]
        if len(stay):
            reasons = "; ".join(coupling.why(stay))
            found.append(f"{len(stay)} of its {len(own)} indices stay: {reasons}")
        return "\n".join(found or ["its indices go only together, and would leave an axis empty"])

    def plan(
        self,
        units: Mapping[str, Sequence[int]] | None = None,
        *,
        budget: Flops | None = None,
        kept: Mapping[str, Mapping[Any, Sequence[int]]] | None = None,
        scores: Mapping[str, np.ndarray] | None = None,
        round_to: int = 1,
        allow_inexact: bool = False,
        skip: bool = False,
    ) -> Plan:
        """Chooses units to remove: by number, for a budget, or as an earlier plan did.

        For a budget, units of a group go by their score. Among groups, first goes the unit that
        costs least per operation that it saves: its share of the score that is left of its group,
        times the number of products that get smaller. Units cost more as their group gets smaller,
        so no group is emptied for the sake of others, and scales of scores do not matter. Layers
        of scans, and blocks, go by number only.

        Args:
            units: Group -> the numbers of the units that go.
            budget: `flops(share)`: units go until at most this share of the operations is left, in
                the order of their scores, as said below.
            kept: ``Plan.kept`` of an earlier plan, also from JSON.
            scores: Of units, for a budget; by default `scores` of magnitudes.
            round_to: The number of indices that is left of each axis of a group is a multiple of
                it, such as 128 for the lanes of a TPU. A budget leaves other groups as they are;
                units chosen by number have to fit.
            allow_inexact: Whether to remove units also where the removed function then differs from
                the masked one. A budget takes them too then.
            skip: Whether units that a softmax, a maximum or `lax.top_k` chooses from are skipped,
                as experts are: the smaller function is then the masked one in which what is
                chosen from is -inf at removed units.

        Returns:
            The plan.

        Raises:
            NotRemovable: An index would go that has to stay; an axis would be empty; or the removal
                is not exact, and ``allow_inexact`` is false.
            ValueError: Arguments that name nothing, or a budget that cannot be met.
        """
        check_round_to(round_to)
        if sum(x is not None for x in (units, budget, kept)) != 1:
            raise ValueError("plan() takes one of units, budget= and kept=")
        if kept is not None:
            shapes = {p: tuple(map(len, axes)) for p, axes in self._analysis.params.items()}
            gone = gone_from_kept(kept, shapes)
            plan = self._plan(
                {}, seeds_of(self._analysis, gone), emptied(gone), allow_inexact, skip
            )
            more = [p for p in plan.gone if p not in gone or not _same(plan.gone[p], gone[p])]
            if more:
                raise ValueError(
                    f"kept= removes indices of {more[0]!r} without what goes with them"
                )
            return plan
        if budget is not None:
            units = self._affordable(budget, scores, round_to, allow_inexact, skip)
        checked = {name: self._checked(name, own, round_to) for name, own in (units or {}).items()}
        pairs = [(self[name].paths, i) for name, own in checked.items() for i in own]
        whole = {path for paths, i in pairs if paths for path in paths[i]}
        return self._plan(checked, self._seeds(checked), whole, allow_inexact, skip)

    def _kept(self, seeds: Iterable[int], whole: Collection[str] = ()) -> Kept:
        return kept_without(self._analysis, seeds, whole)

    def _seeds(self, units: Mapping[str, Sequence[int]]) -> set[int]:
        return {x for name, own in units.items() for i in own for x in self[name].seeds[i]}

    def _inexact(
        self, kept: Kept, whole: Collection[str] = (), skip: bool = False
    ) -> tuple[str, ...]:
        body = self._analysis.body
        masked = [is_float(x) for _, x in named_leaves(self.params)]
        rest = len(body.ins) - len(masked)
        own = numbers(self._analysis, whole)
        return tuple(inexact_reductions(body, kept, masked + [False] * rest, own, skip))

    def _group(self, units: Units) -> Group:
        kept = self._kept(units.seeds[0])
        pairs = list(zip(self._work, work_of(self._analysis.body, kept), strict=True))
        saved = sum(w.times * w.flops - less.times * less.flops for w, less in pairs)
        products = sum(w.times for w, less in pairs if less.flops < w.flops)
        layers = self._steps.issuperset(units.seeds[0])
        inexact = self._inexact(kept)
        skippable = bool(inexact) and not self._inexact(kept, skip=True)
        return Group(*units, inexact, saved, products, layers, skippable=skippable)

    def _multiple(self, name: str, round_to: int) -> int:
        return unit_multiple(round_to, (m.indices.shape[1] for m in self[name].members))

    def _checked(self, name: str, units: Sequence[int], round_to: int) -> tuple[int, ...]:
        """The numbers of units of a group, in order."""
        if name not in self:
            raise ValueError(f"there is no group {name!r}; there are {', '.join(self)}")
        n, own = len(self[name]), sorted({int(i) for i in units})
        if own and not 0 <= own[0] <= own[-1] < n:
            raise ValueError(f"{name!r} has units 0 to {n - 1}, and not {own[0]} to {own[-1]}")
        if len(own) == n and not self[name].paths:
            raise NotRemovable(f"all {n} units of {name!r} would go; at least one has to stay")
        multiple = self._multiple(name, round_to)
        if own and (n - len(own)) % multiple:
            raise ValueError(
                f"{n - len(own)} units of {name!r} are left, and round_to={round_to} asks for a "
                f"multiple of {multiple}: remove {n - (n - len(own)) // multiple * multiple} units"
            )
        return tuple(own)

    def _plan(
        self,
        units: dict[str, tuple[int, ...]],
        seeds: set[int],
        whole: set[str],
        allow_inexact: bool,
        skip: bool,
    ) -> Plan:
        found, kept = self._analysis, self._kept(seeds, whole)
        for name, axes in {**found.params, **found.inputs}.items():
            if 0 in kept.shape(axes) and all(map(len, axes)):
                raise NotRemovable(f"nothing would be left of {name!r}")
        if empty := self._emptied(kept):
            raise NotRemovable(
                f"{len(empty)} axes inside of the function would be empty, such as one of length "
                f"{len(empty[0])}: its indices are a part of those that go"
            )
        inexact = self._inexact(kept, whole, skip)
        if inexact and not allow_inexact:
            skips = "" if skip or self._inexact(kept, whole, True) else "skip=True skips them; "
            raise NotRemovable(
                f"the function without these units differs from the masked one: "
                f"{'; '.join(inexact[:4])}; {skips}allow_inexact=True removes them nevertheless"
            )
        flags = lambda named: {n: kept.gone(a) for n, a in named.items() if kept.shrinks(a)}
        counts = self._total, total_flops(work_of(found.body, kept))
        gone, inputs = flags(found.params), flags(found.inputs)
        for path in whole:
            # One form for all, whatever else goes.
            gone[path] = tuple(np.full(len(a), k == 0) for k, a in enumerate(found.params[path]))
        return Plan(self.fn, self.params, units, gone, inputs, self.frame, inexact, counts, skip)

    def _emptied(self, kept: Kept) -> list[np.ndarray]:
        return [a for a in self._axes if len(a) and not kept.size(a)]

    def _affordable(
        self,
        budget: Flops,
        scores: Mapping[str, np.ndarray] | None,
        round_to: int,
        allow_inexact: bool,
        skip: bool,
    ) -> dict[str, list[int]]:
        """The units that go for a budget."""
        if not isinstance(budget, Flops):
            raise TypeError(f"budget={budget!r}; jaxopt_compress.flops(0.5) is one")
        scores = self.scores() if scores is None else scores
        offers = {
            name: Offer(
                checked_scores(name, scores[name], len(group)),
                *(group.flops, group.products, self._multiple(name, round_to)),
            )
            for name, group in self.items()
            if name in scores
            and not group.layers
            and group.flops > 0
            and (allow_inexact or not group.inexact or (skip and group.skippable))
        }
        left = lambda units: work_of(self._analysis.body, self._kept(self._seeds(units)))
        share = lambda units: total_flops(left(units)) / self._total
        return afford(offers, budget, share, self._needed)

    def _needed(self, units: Mapping[str, Sequence[int]]) -> list[list[tuple[str, int]]]:
        """Per axis that would be empty, the units that make it so."""
        found = []
        for axis in self._emptied(self._kept(self._seeds(units))):
            own = set(self._analysis.coupling.component[axis].tolist())
            at = [(name, i) for name, chosen in units.items() for i in chosen]
            found.append([(name, i) for name, i in at if own & {*self[name].seeds[i]}])
            if not found[-1]:
                raise NotRemovable("the budget would leave an axis inside of the function empty")
        return found


def _same(a: Gone, b: Gone) -> bool:
    return all(map(np.array_equal, a, b))
