"""How many units go, and which, for a share of the operations of a function."""

import collections
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxopt_compress.rewriting.coupling.equations import Body
from jaxopt_compress.rewriting.coupling.products import PRODUCTS, multiplications
from jaxopt_compress.rewriting.coupling.replay import Kept
from jaxopt_compress.tree.budgets import Flops


class Work(NamedTuple):
    """A product or convolution: how often it runs, and the operations of one run."""

    times: int
    flops: int


def work_of(body: Body, kept: Kept, times: int = 1) -> list[Work]:
    """The products and convolutions of a function with the indices that are left, in order."""
    found = []
    skipped = kept.skips.get(body)
    for node in body.nodes:
        own = 0 if skipped is not None and node in skipped.dead else times
        if node.name in PRODUCTS and not node.whole:
            found.append(Work(own, 2 * multiplications(kept, node) if own else 0))
        inner = own * kept.size(node.notes["lead"]) if node.name == "scan" else own
        inner *= node.notes.get("devices", 1)
        for called in node.bodies:
            found += work_of(called, kept, inner)
    return found


def total_flops(work: Iterable[Work]) -> int:
    """The operations of all runs."""
    return sum(w.times * w.flops for w in work)


class Offer(NamedTuple):
    """A group from which units may be taken.

    Attributes:
        scores: Per unit, at least 0.
        saved: The operations that one unit saves.
        products: How many products and convolutions get smaller.
        multiple: The number of units that are left has to be a multiple of this.
    """

    scores: np.ndarray
    saved: int
    products: int
    multiple: int


def checked_scores(name: str, scores: ArrayLike, count: int) -> np.ndarray:
    """The scores of a group.

    Raises:
        ValueError: They are not ``count`` numbers of at least 0.
    """
    found = np.asarray(scores)
    if found.shape != (count,) or not (found >= 0).all():
        raise ValueError(
            f"scores of {name!r} have shape {found.shape}; they have to be {count} numbers of at "
            "least 0"
        )
    return found


def in_order(offers: Mapping[str, Offer]) -> list[str]:
    """The groups' names, one for each unit but the last ones, in the order in which units go.

    Units of a group go by their score. Among groups, first goes the unit that costs least per
    operation that it saves, where its cost is

        score_u / (sum of the scores of the units of the group that are left) * products

    and ``products`` is how many products get smaller with it. This is the greedy order that keeps
    the sum over products of ``log(score left)`` large. A unit costs more as its group gets smaller,
    so no group is emptied for the sake of others; the units of a residual stream cost more than
    those of one hidden layer; and scales of scores do not matter.
    """
    keys: list[np.ndarray] = [np.zeros(0)]
    names: list[str] = []
    for name, offer in offers.items():
        scores = np.sort(np.asarray(offer.scores, np.float64))
        left = np.cumsum(scores[::-1])[::-1]
        share = np.divide(scores, left, out=np.zeros_like(scores), where=left > 0)
        cost = np.maximum.accumulate(share) * offer.products
        keys.append((cost / offer.saved)[:-1])
        names += [name] * (len(scores) - 1)
    order = np.argsort(np.concatenate(keys), kind="stable")
    return [names[i] for i in order]


def worst(offer: Offer, count: int, staying: Collection[int] = ()) -> list[int]:
    """The ``count`` units with the lowest scores, or fewer, so that a multiple of units is left."""
    n = len(offer.scores)
    left = min(math.ceil((n - count) / offer.multiple) * offer.multiple, n)
    order = np.argsort(offer.scores, kind="stable").tolist()
    return [i for i in order if i not in staying][: n - left]


def afford(
    offers: Mapping[str, Offer],
    budget: Flops,
    share_left: Callable[[dict[str, list[int]]], float],
    emptied: Callable[[dict[str, list[int]]], list[list[tuple[str, int]]]],
) -> dict[str, list[int]]:
    """Group -> the units that go: as few as possible, in the order of `in_order`.

    Args:
        offers: Group -> what it offers.
        budget: The share of operations that may be left.
        share_left: ``share_left(units)``: the share of operations that is left without them.
        emptied: ``emptied(units)``: the sets of them of which one has to stay.

    Raises:
        ValueError: The budget cannot be met.
    """
    order = in_order(offers)
    staying: dict[str, set[int]] = {name: set() for name in offers}

    def first(count: int) -> dict[str, list[int]]:
        counts = collections.Counter(order[:count])
        return {name: worst(offers[name], n, staying[name]) for name, n in counts.items()}

    while True:
        least = share_left(first(len(order)))
        if least > budget.share:
            raise ValueError(
                f"flops({budget.share}) cannot be met: with one unit of each group, {least:.4f} of "
                "the operations are left; the others are in axes that stay"
            )
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            met = share_left(first(middle)) <= budget.share
            low, high = (low, middle) if met else (middle + 1, high)
        units = first(low)
        short = emptied(units)
        if not short:
            return {name: own for name, own in units.items() if own}
        for candidates in short:
            name, unit = max(candidates, key=lambda at: float(offers[at[0]].scores[at[1]]))
            staying[name].add(unit)


def unit_multiple(round_to: int, per_axis: Iterable[int]) -> int:
    """How many units keep each axis they touch at multiples of ``round_to`` indices.

    Example:
        >>> unit_multiple(128, [64]), unit_multiple(128, [1, 2]), unit_multiple(1, [3])
        (2, 128, 1)
    """
    return math.lcm(*(round_to // math.gcd(round_to, n) for n in per_axis))


def check_round_to(round_to: object) -> None:
    """Refuses values that are not a number of indices."""
    if type(round_to) is not int or round_to < 1:
        raise ValueError(f"round_to={round_to!r}: it is a number of indices, such as 128")
