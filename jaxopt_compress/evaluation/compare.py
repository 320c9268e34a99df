"""Several trees of parameters of one function side by side."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.evaluation.evaluate import Totals, call, hashable, unpacked
from jaxopt_compress.evaluation.metrics import Metric, Metrics, checked, mean
from jaxopt_compress.evaluation.scores import answers, are_scores
from jaxopt_compress.evaluation.sums import weighted_sum
from jaxopt_compress.evaluation.timing import interleave, median
from jaxopt_compress.lift import uses
from jaxopt_compress.lift.interpreter import OnFallback
from jaxopt_compress.planning.tables import Table, as_rich, as_text
from jaxopt_compress.tree import named_leaves, nbytes, resident_bytes

_FIGURES = ("agreement", "difference", "stored_bytes", "ratio", "resident_bytes", "flops",
            "milliseconds")  # fmt: skip


class Comparison(dict[str, dict[str, Any]]):
    """A table of variants that is also a plain dict: ``{variant: {figure: value}}``.

    Besides the metrics a variant has

    - ``agreement``: the share of examples with the first variant's answer (class of the highest
      score); None if outputs are no scores of classes;
    - ``difference``: ``||y - y_first||_F / ||y_first||_F`` over all outputs;
    - ``stored_bytes``, their ``ratio`` to the first variant's, and ``resident_bytes``;
    - ``flops``: floating operations of all products with parameters in a call on the first batch,
      those with both factors of a low-rank parameter; None where a loop's length is unknown.
      Products of activations with each other are not counted;
    - ``milliseconds``: ``{"median", "low", "high"}`` of a compiled call on the first batch, with a
      95% confidence interval; None if there were no rounds.

    `json.dumps` takes it as it is, up to metrics that are NaN; `str` and rich print it as a table.
    """

    def __str__(self) -> str:
        return as_text(self._table())

    def __rich__(self) -> Any:
        return as_rich(self._table())

    def _table(self) -> Table:
        names = list(next(iter(self.values()), {}))
        names = [n for n in names if any(row[n] is not None for row in self.values())]
        titles = ["variant", *(_TITLES.get(n, n) for n in names)]
        rows = [
            [name, *("" if row[n] is None else _FORMATS.get(n, _figure)(row[n]) for n in names)]
            for name, row in self.items()
        ]
        return Table(titles, rows, [], [False, *(True for _ in names)])


_figure = "{:.4f}".format
_TITLES = {"stored_bytes": "bytes", "resident_bytes": "in memory", "milliseconds": "ms"}
_FORMATS: dict[str, Callable[[Any], str]] = {
    "difference": "{:.1e}".format,
    "stored_bytes": "{:,}".format,
    "resident_bytes": "{:,}".format,
    "ratio": "{:.2f}".format,
    "flops": "{:.3g}".format,
    "milliseconds": lambda t: "{median:.4g} [{low:.4g}, {high:.4g}]".format(**t),
}


def compare(
    fn: Callable[..., Any],
    variants: Mapping[str, Any],
    batches: Iterable[Any],
    metrics: Metrics,
    rounds: int = 11,
    on_fallback: OnFallback = "warn",
) -> Comparison:
    """Measures quality, size and speed of several trees of parameters of one function.

    The batches are gone through once, and every variant sees each; memory holds the outputs of two
    variants for one batch. Times are those of compiled calls on the first batch in rounds that take
    turns in random order, so that what disturbs the machine disturbs all variants alike.

    Args:
        fn: As in `evaluate`.
        variants: Name -> parameters, dense or compressed; the others are compared with the first.
        batches: As in `evaluate`.
        metrics: As in `evaluate`.
        rounds: How often a call of each variant is timed; 0 for no times.
        on_fallback: As in `evaluate`.

    Returns:
        The `Comparison`.

    Raises:
        ValueError: There are no variants, a metric has the name of another figure, or what
            `evaluate` raises.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jnp.linspace(-1, 1, 32).reshape(8, 4) ** 3}
        >>> variants = {"float32": params, "int4": jc.compress(params, jc.quantize("int4"))}
        >>> batches = [(jnp.eye(8), jnp.array([3] * 8))]
        >>> model = lambda params, x: x @ params["w"]
        >>> print(jc.compare(model, variants, batches, ["accuracy"], rounds=0))
        variant  accuracy  agreement  difference  bytes  ratio  in memory  flops
        -------  --------  ---------  ----------  -----  -----  ---------  -----
        float32    1.0000     1.0000     0.0e+00    128   1.00        128    512
        int4       0.6250     0.6250     7.0e-02     32   4.00         48    512
    """
    chosen = checked(metrics)
    taken = [metric.name for metric in chosen if metric.name in _FIGURES]
    if taken:
        raise ValueError(f"the metric {taken[0]!r} has the name of a figure of each comparison")
    if not variants:
        raise ValueError("variants is empty: pass {name: parameters}")
    run = functools.partial(call, hashable(fn), on_fallback)
    totals = {name: Totals(chosen) for name in variants}
    against: dict[str, Totals] = {}
    first: tuple[Any, ...] | None = None
    for inputs, targets, weights in unpacked(batches):
        first = inputs if first is None else first
        reference = None
        for name, params in variants.items():
            outputs = run(params, inputs)
            reference = outputs if reference is None else reference
            totals[name].add(outputs, targets, weights)
            if name not in against:
                against[name] = Totals(_relations(outputs, targets))
            against[name].add(outputs, reference, weights)
    assert first is not None
    times = _milliseconds(run, variants, first, rounds)
    whole = nbytes(next(iter(variants.values())))
    found = Comparison()
    for name, params in variants.items():
        related, size = against[name].results(), nbytes(params)
        found[name] = {
            **totals[name].results(),
            "agreement": related.get("agreement"),
            "difference": related["difference"],
            "stored_bytes": size,
            "ratio": whole / size if size else None,
            "resident_bytes": resident_bytes(params),
            "flops": _flops(fn, params, first),
            "milliseconds": times.get(name),
        }
    return found


def _relations(outputs: Any, targets: Any) -> tuple[Metric, ...]:
    """What relates outputs to those of the first variant."""
    return (_DIFFERENCE, _AGREEMENT) if are_scores(outputs, targets) else (_DIFFERENCE,)


def _agree(outputs: jax.Array, reference: jax.Array) -> jax.Array:
    return answers(outputs) == answers(reference)


def _squares(outputs: Any, reference: Any, weights: jax.Array | None) -> Any:
    """The squared norms of the difference and of the reference."""
    leaves = [jax.tree.leaves(tree) for tree in (outputs, reference)]
    pairs = [[jnp.asarray(x, jnp.float32) for x in pair] for pair in zip(*leaves, strict=True)]
    return (
        sum(weighted_sum((y - of_first) ** 2, weights) for y, of_first in pairs),
        sum(weighted_sum(of_first**2, weights) for _, of_first in pairs),
    )


def _relative_norm(squares: Any) -> float:
    differs, whole = (math.sqrt(x) for x in squares)
    return differs / whole if whole else 0.0 if differs == 0 else math.inf


_AGREEMENT = mean(_agree, "agreement")
_DIFFERENCE = Metric("difference", _squares, _relative_norm)


def _milliseconds(
    run: Callable[..., Any], variants: Mapping[str, Any], inputs: tuple[Any, ...], rounds: int
) -> dict[str, dict[str, float]]:
    """By variant, the median of a call's time and its interval."""
    if rounds < 1:
        return {}
    inputs = jax.tree.map(lambda x: jnp.asarray(x) if hasattr(x, "shape") else x, inputs)
    calls = {name: functools.partial(run, params, inputs) for name, params in variants.items()}
    samples = interleave(calls, rounds, warmup=1)
    milliseconds = lambda seconds: median([1e3 * s for s in seconds])._asdict()
    return {name: milliseconds(each.wall) for name, each in samples.items()}


def _flops(fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> int | None:
    """Of all products with parameters, in the form in which they run."""
    leaves, total = dict(named_leaves(params)), 0
    for path, each in uses(fn, params, *inputs).items():
        for use in each:
            if use.flops is None:
                return None
            total += round(use.flops * _share(leaves[path]))
    return total


def _share(leaf: Any) -> float:
    """The operations of a product with a leaf, over those with its dense form."""
    factors = leaf.factors().values() if is_compressed(leaf) else ()
    return sum(x.size * _share(x) for x in factors) / leaf.size if factors else 1.0
