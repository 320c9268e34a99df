"""Quality against bytes, over several budgets."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxopt_compress.compression import compress
from jaxopt_compress.evaluation import compare
from jaxopt_compress.evaluation.compare import Comparison
from jaxopt_compress.evaluation.metrics import Metrics
from jaxopt_compress.lift import Stats, Uses
from jaxopt_compress.planning import Allocation, Sensitivities, allocate
from jaxopt_compress.planning.allocate import Bytes
from jaxopt_compress.typing import PyTree


class Frontier(Comparison):
    """A `compare` of allocations: ``{name: figures}``, the dense parameters first.

    A row has also ``budget``, the share of the bytes that was asked for, and ``increase``, that of
    the loss as the table has it.

    Attributes:
        recipes: Name -> `Allocation`.
        trees: Name -> parameters in their stored form.
    """

    recipes: dict[str, Allocation]
    trees: dict[str, Any]


def frontier(
    fn: Callable[..., Any],
    params: PyTree,
    table: Sensitivities,
    budgets: Sequence[Bytes],
    held_out: Iterable[Any],
    metrics: Metrics,
    *,
    uses: Uses | None = None,
    stats: Stats | None = None,
    tune: Callable[[Allocation], Any] | None = None,
    rounds: int = 0,
) -> Frontier:
    """Measures what one table of sensitivities gives under several budgets.

    Memory holds the stored form of all of them.

    Args:
        fn: ``fn(params, *inputs)``, as in `evaluate`.
        params: Dense.
        table: What `sensitivities` found for them.
        budgets: Each a `jaxopt_compress.bytes` of a share.
        held_out: Batches as in `evaluate`, best ones that the table has not seen.
        metrics: As in `evaluate`.
        uses: What `uses` found.
        stats: What `calibrate` found, for candidates that need it.
        tune: ``tune(recipe) -> tree``: trains with a recipe, and returns the stored form. By
            default parameters are compressed without training. Without labels it is
            ``lambda recipe: distill(fn, params, compress(params, recipe), batches)``.
        rounds: The rounds of timing, as in `compare`; 0 for no times.

    Returns:
        The `Frontier`.

    Raises:
        ValueError: There are no budgets, two are the same, or nothing fits one of them.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 4))}
        >>> model = lambda params, x: x @ params["w"]
        >>> x = jax.random.normal(jax.random.key(1), (256, 64))
        >>> y = model(params, x)
        >>> loss = lambda params, x, y: jnp.mean((model(params, x) - y) ** 2)
        >>> uses = jc.uses(model, params, x)
        >>> candidates = {"int4": jc.quantize("int4"), "int8": jc.quantize("int8")}
        >>> table = jc.sensitivities(loss, params, candidates, [(x, y)], uses=uses)
        >>> budgets = [jc.bytes(0.3), jc.bytes(0.2)]
        >>> found = jc.frontier(model, params, table, budgets, [(x, y)], ["rmse"], uses=uses)
        >>> [(name, row["stored_bytes"]) for name, row in found.items()]
        [('dense', 1024), ('30%', 272), ('20%', 144)]
        >>> found.recipes["20%"].choices
        {'w': 'int4'}
    """
    names = [f"{100 * budget.share:.4g}%" for budget in budgets]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"budgets={list(budgets)}: they are different shares, at least one")
    # All of them before any training or measuring, so that what fits nothing says so at once.
    recipes = {n: allocate(table, budget) for n, budget in zip(names, budgets, strict=True)}
    trees: dict[str, Any] = {"dense": params}
    for name, recipe in recipes.items():
        trees[name] = small_form(params, recipe, uses, stats, tune)
    found = Frontier(compare(fn, trees, held_out, metrics, rounds=rounds))
    found.recipes, found.trees = recipes, trees
    for name, row in found.items():
        recipe = recipes.get(name)
        row["budget"] = 1.0 if recipe is None else budgets[names.index(name)].share
        row["increase"] = 0.0 if recipe is None else recipe.increase
    return found


def small_form(
    params: PyTree,
    recipe: Allocation,
    uses: Uses | None,
    stats: Stats | None,
    tune: Callable[[Allocation], Any] | None,
) -> Any:
    """The stored form by a recipe, after training if there is any; one for nothing is no recipe."""
    if not recipe:
        return params
    return compress(params, recipe, uses=uses, stats=stats) if tune is None else tune(recipe)
