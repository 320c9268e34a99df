"""What `prune` was asked for."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxopt_compress.sparsity.distributions import Distribution
from jaxopt_compress.sparsity.grow import Grow
from jaxopt_compress.sparsity.schedule import Schedule
from jaxopt_compress.sparsity.score import Score
from jaxopt_compress.sparsity.units import Pattern


class Rules(NamedTuple):
    """What `prune` was asked for.

    Attributes:
        score: Which entries are kept.
        schedule: How many; None with a threshold.
        threshold: The step to the least score that is kept; None with a schedule.
        pattern: What is kept or pruned as one.
        scope: What is compared with what, one of `units.SCOPES`.
        distribution: Sparsity per parameter; None if it is that of the schedule.
        grow: How kept entries are exchanged; None if they are not.
        stack: How many leading axes are parameters of their own.
        straight_through: Whether pruned entries get gradients.
        zero: Whether training sets pruned entries to 0.
    """

    score: Score
    schedule: Schedule | None
    threshold: Callable[[Any], Any] | None
    pattern: Pattern
    scope: str
    distribution: Distribution | None
    grow: Grow | None
    stack: int
    straight_through: bool
    zero: bool
