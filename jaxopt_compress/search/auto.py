"""The smallest parameters whose quality stays within bounds."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxopt_compress.evaluation import evaluate
from jaxopt_compress.evaluation.metrics import checked
from jaxopt_compress.lift import Stats, Uses
from jaxopt_compress.lift import uses as find_uses
from jaxopt_compress.planning import Allocation, Sensitivities, allocate, bytes, sensitivities
from jaxopt_compress.planning.allocate import Bytes, choose
from jaxopt_compress.planning.sensitivity_table import DENSE
from jaxopt_compress.planning.tables import Table, as_text
from jaxopt_compress.search.frontier import small_form
from jaxopt_compress.search.recipes import Candidate, as_toml, default_candidates, made
from jaxopt_compress.tree import nbytes
from jaxopt_compress.typing import PyTree


class Trial(NamedTuple):
    """A recipe that was tried.

    Attributes:
        name: The share of bytes that was asked for, or the one candidate that all rows got.
        bytes: What the parameters take.
        figures: Metric -> value, on held-out batches.
        met: Whether all bounds were kept.
        recipe: The recipe.
    """

    name: str
    bytes: int
    figures: dict[str, float]
    met: bool
    recipe: Allocation


class Auto(NamedTuple):
    """What `auto` found; `str` is a table of all that was tried.

    Attributes:
        params: In their stored form; as they were if no recipe kept the bounds.
        recipe: The `Allocation`; None if no recipe kept the bounds.
        figures: Metric -> value of ``params`` on held-out batches.
        dense: Metric -> value before compression.
        met: Whether a recipe kept the bounds, within the budget if there was one.
        trials: In the order in which they were tried.
        table: The sensitivities, for other budgets.
        candidates: As they were given.
    """

    params: PyTree
    recipe: Allocation | None
    figures: dict[str, float]
    dense: dict[str, float]
    met: bool
    trials: list[Trial]
    table: Sensitivities
    candidates: Mapping[str, Candidate]

    def toml(self) -> str:
        """The recipe as text for `read_recipe`, which compresses to the same again.

        Raises:
            ValueError: There is no recipe, or a candidate was given as a compression.
        """
        if not self.recipe:
            raise ValueError("no recipe kept the bounds, so that there is none to write")
        return as_toml(self.recipe, self.candidates)

    def __str__(self) -> str:
        names = list(self.dense)
        shown = lambda name, size, figures, met: [
            name,
            f"{size:,}",
            *(f"{figures[k]:.4f}" for k in names),
            met,
        ]
        rows = [shown("dense", self.table.dense_bytes, self.dense, "")]
        rows += [shown(t.name, t.bytes, t.figures, "yes" if t.met else "no") for t in self.trials]
        titles = ["tried", "bytes", *names, "within"]
        return as_text(Table(titles, rows, [], [False] + [True] * (len(names) + 2)))


def auto(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Sequence[tuple[Any, ...]],
    loss: Callable[..., Any],
    *,
    within: Mapping[Any, float],
    held_out: Sequence[Any],
    budget: Bytes | None = None,
    candidates: Mapping[str, Candidate] | None = None,
    uses: Uses | None = None,
    stats: Stats | None = None,
    tune: Callable[[Allocation], Any] | None = None,
    evaluations: int = 8,
    measured: int = 2,
    progress: bool = False,
) -> Auto:
    """Finds the smallest parameters whose quality on held-out data stays within bounds.

    `sensitivities` are found once; then `allocate` is asked for shares of bytes between the least
    and the most, halving their ratio, and each answer is compressed (and trained, with ``tune``)
    and measured. Last, candidates that all rows get alike are tried where they are smaller than the
    best so far: increases of the loss do not always add up, and the loss is not the metric.

    The best of several was chosen on ``held_out``: report its quality on data that took no part.

    Args:
        fn: ``fn(params, *inputs)``, as in `evaluate`.
        params: Dense.
        batches: Tuples of arguments of the loss, of one shape.
        loss: ``loss(params, *batch) -> scalar``.
        within: Metric -> by how much it may change; the sign says which way is worse:
            ``{"accuracy": -0.01, "rmse": 0.02}``.
        held_out: Batches as in `evaluate`.
        budget: The most that may be stored; by default whatever is smaller than the dense one.
        candidates: Name -> compression, or a table of methods as in a recipe file, which can be
            written again: ``{"int8": {"quantize": {"format": "int8"}}}``. By default
            integers of 2 to 8 bits, and 8 bits with half of the entries pruned.
        uses: What `uses` found; by default it is found here.
        stats: What `calibrate` found, for candidates that need it, such as `gptq`.
        tune: ``tune(recipe) -> tree``: trains with a recipe, and returns the stored form, as in
            `frontier`.
        evaluations: How many shares are tried at most.
        measured: As in `sensitivities`.
        progress: As in `sensitivities`.

    Returns:
        The `Auto`; where no recipe kept the bounds, its ``met`` is False.

    Raises:
        ValueError: A bound is 0 or not finite, there are none, there are too few evaluations, or
            nothing fits the budget.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 4))}
        >>> model = lambda params, x: x @ params["w"]
        >>> x = jax.random.normal(jax.random.key(1), (256, 64))
        >>> y = model(params, x)
        >>> loss = lambda params, x, y: jnp.mean((model(params, x) - y) ** 2)
        >>> tables = {name: {"quantize": {"format": name}} for name in ("int4", "int8")}
        >>> found = jc.auto(
        ...     model,
        ...     params,
        ...     [(x, y)],
        ...     loss,
        ...     within={"rmse": 0.5},
        ...     held_out=[(x, y)],
        ...     candidates=tables,
        ... )
        >>> found.met, found.recipe.choices, jc.nbytes(found.params)
        (True, {'w': 'int8'}, 272)
        >>> print(found.toml())
        [[rule]]
        where = ["w"]
        quantize = {"format" = "int8"}
    """
    _checked(within, evaluations)
    metrics = checked(within)
    named = list(zip(metrics, within, strict=True))
    candidates = default_candidates() if candidates is None else candidates
    inputs = held_out[0][0]
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    uses = find_uses(fn, params, *inputs) if uses is None else uses
    table = sensitivities(
        loss, params, made(candidates), batches,
        uses=uses, stats=stats, measured=measured, progress=progress,
    )  # fmt: skip
    dense = evaluate(fn, params, held_out, metrics)
    trials: list[Trial] = []
    trees: dict[int, Any] = {}

    def keeps(name: str, recipe: Allocation) -> bool:
        known = [t.met for t in trials if t.recipe.choices == recipe.choices]
        if known:
            return known[0]
        small = small_form(params, recipe, uses, stats, tune)
        figures = evaluate(fn, small, held_out, metrics)
        changes = [(figures[m.name] - dense[m.name], within[key]) for m, key in named]
        # A figure that is NaN keeps no bound; differences are rounded, as in 0.977 - 0.975.
        met = all(x * math.copysign(1, c) <= abs(c) * (1 + 1e-9) for x, c in changes)
        trials.append(Trial(name, nbytes(small), figures, met, recipe))
        if met and trials[-1].bytes <= min(t.bytes for t in trials if t.met):
            trees.clear()  # No more than the best so far is held.
            trees[len(trials) - 1] = small
        return met

    _search(keeps, table, budget, evaluations, trials)
    if not trees:
        return Auto(params, None, dense, dense, False, trials, table, candidates)
    [(i, small)] = trees.items()
    best = trials[i]
    return Auto(small, best.recipe, best.figures, dense, True, trials, table, candidates)


def _search(
    keeps: Callable[[str, Allocation], bool],
    table: Sensitivities,
    budget: Bytes | None,
    evaluations: int,
    trials: list[Trial],
) -> None:
    """Shares between the least and the most, then candidates that all rows get alike."""
    whole = table.dense_bytes
    high = 1.0 if budget is None else budget.share
    # A byte more, so that rounding does not leave it out; all of it where nothing is smaller.
    low = min((table.least_bytes + 1) / whole, high)
    ask = lambda share: keeps(f"{100 * share:.3g}%", allocate(table, bytes(share)))
    # Without a budget the upper end is the dense parameters, which keep any bound.
    good = budget is None or ask(high)
    if good and not ask(low):
        for _ in range(evaluations - 2):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if ask(middle) else (middle, high)
    for name in table.candidates:
        recipe = choose(
            table, {r: name if name in own else DENSE for r, own in table.cells.items()}
        )
        sizes = [t.bytes for t in trials if t.met]
        if recipe.bytes < min(sizes, default=high * whole):
            keeps(f"{name} alone", recipe)


def _checked(within: Mapping[Any, float], evaluations: int) -> None:
    if not within:
        raise ValueError('within is empty; a bound is {"accuracy": -0.01}')
    for metric, change in within.items():
        if change == 0 or not math.isfinite(change):
            raise ValueError(
                f"within[{metric!r}]={change}: by how much it may change, with the sign of what is "
                "worse, such as -0.01 of accuracy and 0.01 of rmse"
            )
    if evaluations < 3:
        raise ValueError(f"evaluations={evaluations}: it takes 3 at least, two of them at the ends")
