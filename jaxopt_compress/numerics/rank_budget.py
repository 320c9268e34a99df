"""Ranks of several matrices within one budget."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Offer(NamedTuple):
    """What ranks of one matrix cost, and how much of it they lose.

    Attributes:
        losses: From rank 0 on, each at most the one before it, with steps that get no larger.
        cost: The cost of one rank.
        whole: The cost of the matrix itself, which loses nothing.
    """

    losses: np.ndarray
    cost: int
    whole: int


def ranks_within(offers: Sequence[Offer], budget: int) -> list[int | None]:
    r"""The ranks with the least sum of losses whose costs fit a budget.

    .. math:: \min_r \sum_i \ell_i(r_i) \quad \text{with} \quad \sum_i c_i r_i \le B

    Ranks are bought one by one, always where a unit of cost saves the most. Steps of losses get no
    larger, so no other choice of the same cost loses less, up to the last rank that does not fit. A
    matrix for which the next rank would cost as much as the matrix itself is kept whole.

    Args:
        offers: One for each matrix.
        budget: At least the cost of one rank of each.

    Returns:
        The ranks, at least 1; None for a matrix that is kept whole.

    Raises:
        ValueError: Not even rank 1 of each fits.

    Example:
        >>> steep = Offer(np.array([1.0, 0.2, 0.1, 0.0]), cost=2, whole=9)
        >>> flat = Offer(np.array([0.9, 0.6, 0.3, 0.0]), cost=2, whole=9)
        >>> ranks_within([steep, flat], 8)
        [1, 3]
    """
    # A matrix that is thinner than factors of rank 1 stays whole.
    least = sum(min(offer.cost, offer.whole) for offer in offers)
    if least > budget:
        raise ValueError(f"rank 1 of each takes {least:,}, and the budget is {budget:,}")
    ranks: list[int | None] = [None if o.whole <= o.cost else 1 for o in offers]
    left = budget - least
    queue = []
    for i, offer in enumerate(offers):
        if ranks[i] is not None:
            _push(queue, i, offer, 1)
    while queue:
        _, i, price, rank = heapq.heappop(queue)
        if price > left:
            continue
        left -= price
        ranks[i] = rank
        if rank is not None:
            _push(queue, i, offers[i], rank)
    return ranks


def _push(queue: list, i: int, offer: Offer, rank: int) -> None:
    """Offers the rank above ``rank``, or the whole matrix where that costs no more."""
    price, new = offer.cost, rank + 1
    if (rank + 1) * offer.cost >= offer.whole or rank + 1 >= len(offer.losses):
        price, new = offer.whole - rank * offer.cost, None
    saved = offer.losses[rank] - (0 if new is None else offer.losses[new])
    heapq.heappush(queue, (-saved / max(price, 1), i, max(price, 0), new))
