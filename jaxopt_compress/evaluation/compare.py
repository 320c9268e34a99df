"""Several trees of parameters of one function side by side."""

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.evaluation.comparison import FIGURES, Comparison
from jaxopt_compress.evaluation.corruptions import (
    Corruptions,
    check_corruptions,
    is_signal,
    versions,
)
from jaxopt_compress.evaluation.evaluate import Batch, Totals, call, hashable, lowered, unpacked
from jaxopt_compress.evaluation.metric import Metric, Metrics, mean
from jaxopt_compress.evaluation.metrics import checked
from jaxopt_compress.evaluation.ranks import area
from jaxopt_compress.evaluation.relations import ATTRIBUTION, input_gradients, relations
from jaxopt_compress.evaluation.scores import answers, are_scores, negative_log_likelihood
from jaxopt_compress.evaluation.significance import kept_values, paired_test
from jaxopt_compress.evaluation.timing import interleave, median
from jaxopt_compress.lift import Statistics, uses
from jaxopt_compress.lift.interpreter import OnFallback
from jaxopt_compress.planning.costs import moved_bytes, picojoules, product_flops
from jaxopt_compress.planning.report import report
from jaxopt_compress.tree import named_leaves, nbytes, resident_bytes
from jaxopt_compress.typing import PyTree

_LOSSES = kept_values(mean(negative_log_likelihood, "losses"))


def compare(
    fn: Callable[..., PyTree],
    variants: Mapping[str, PyTree],
    batches: Iterable[PyTree],
    metrics: Metrics,
    rounds: int = 11,
    on_fallback: OnFallback = "warn",
    *,
    corruptions: Corruptions | None = None,
    key: jax.Array | None = None,
    attribution: bool = False,
    members: Iterable[PyTree] | None = None,
    stats: Mapping[str, Sequence[Statistics]] | None = None,
) -> Comparison:
    """Measures quality, size and speed of several trees of parameters of one function.

    The batches are gone through once, and every variant sees each; memory holds the outputs of two
    variants for one batch, and for each example one number per metric. Times are those of compiled
    calls on the first batch in rounds that take turns in random order, so that what disturbs the
    machine disturbs all variants alike.

    Args:
        fn: As in `evaluate`.
        variants: Name -> parameters, dense or compressed; the others are compared with the first.
        batches: As in `evaluate`.
        metrics: As in `evaluate`.
        rounds: How often a call of each variant is timed; 0 for no times, and no compilation for
            its time and memory.
        on_fallback: As in `evaluate`.
        corruptions: As in `evaluate`; all variants see the same corrupted inputs.
        key: As in `evaluate`.
        attribution: Whether to compare gradients by the inputs.
        members: Batches that the parameters were trained on, for how well losses tell them from
            ``batches``, which they must not have been trained on.
        stats: What `calibrate` found with the first variant, best on held-out batches: adds the
            errors of the outputs of each parameter's products.

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
        variant  accuracy  p of accuracy  agreement  difference
        -------  --------  -------------  ---------  ----------
        float32    1.0000                    1.0000     0.0e+00
        int4       0.6250           0.25     0.6250     7.0e-02
        <BLANKLINE>
        variant  bytes  ratio  in memory  flops  moved      uJ
        -------  -----  -----  ---------  -----  -----  ------
        float32    128   1.00        128    512    512  0.0844
        int4        32   4.00         48    512    416  0.0688

    References:
        Yeom et al., 2018, Privacy Risk in Machine Learning: Analyzing the Connection to
        Overfitting.
    """
    chosen, under = checked(metrics), check_corruptions(corruptions, key)
    taken = [metric.name for metric in chosen if metric.name in FIGURES]
    if taken:
        raise ValueError(f"the metric {taken[0]!r} has the name of a figure of each comparison")
    if not variants:
        raise ValueError("variants is empty: pass {name: parameters}")
    measured = _Measured(hashable(fn), variants, chosen, on_fallback, attribution, rounds > 0)
    for i, batch in enumerate(unpacked(batches)):
        for prefix, seen in versions(batch.inputs, under, key, i):
            measured.add(prefix, batch._replace(inputs=seen))
    losses = measured.membership(members) if members is not None else {}
    times = _times(measured, rounds)
    found = Comparison()
    for name, params in variants.items():
        found[name] = measured.answers(name) | losses.get(name, {})
        if stats is not None and _alike(measured.first_params, params):
            rows = report(measured.first_params, params, stats=stats)["leaves"]
            found[name]["layers"] = {
                r["path"]: r["output_error"] for r in rows if "output_error" in r
            }
        found[name] |= _costs(measured, name) | times.get(name, {})
    return found


class _Measured:
    """The answers of all variants so far."""

    def __init__(
        self,
        fn: Callable[..., PyTree],
        variants: Mapping[str, PyTree],
        metrics: tuple[Metric, ...],
        on_fallback: OnFallback,
        attribution: bool,
        compiled: bool,
    ):
        self.fn, self.variants, self.first = fn, variants, next(iter(variants))
        self.first_params = variants[self.first]
        self.run = functools.partial(call, fn, on_fallback)
        self.compiled: dict[str, dict[str, object]] = {}
        self.batch: Batch | None = None
        self.outputs: dict[str, PyTree] = {}
        self._on_fallback: OnFallback = on_fallback
        self._compiles, self._attribution = compiled, attribution
        self._metrics = metrics
        self._tested = tuple(kept_values(m) for m in metrics if m.values is not None)
        self._totals: dict[tuple[str, str], Totals] = {}

    def add(self, prefix: str, batch: Batch) -> None:
        """Every variant answers a batch."""
        reference: PyTree = None
        if self.batch is None:
            self._begin(batch)
        for name, params in self.variants.items():
            outputs = self.run(params, batch.inputs)
            reference = outputs if name == self.first else reference
            add = functools.partial(self._add, name, weights=batch.weights)
            add(prefix, self._metrics, outputs, batch.targets)
            if prefix:
                continue
            add("paired", self._tested, outputs, batch.targets)
            add("related", relations(outputs, batch.targets), outputs, reference)
            if are_scores(outputs, batch.targets):
                add("losses", (_LOSSES,), outputs, batch.targets)
            self.outputs.setdefault(name, jax.eval_shape(lambda y: y, outputs))
        if self._attribution and not prefix and any(map(is_signal, jax.tree.leaves(batch.inputs))):
            self._attribute(batch, reference)

    def membership(self, members: Iterable[PyTree]) -> dict[str, dict[str, float]]:
        """By variant, how well losses tell members from the batches so far."""
        for batch in unpacked(members):
            for name, params in self.variants.items():
                outputs = self.run(params, batch.inputs)
                self._add(name, "members", (_LOSSES,), outputs, batch.targets, batch.weights)
        found = {}
        for name in self.variants:
            both = [self._results(name, kind)["losses"] for kind in ("members", "losses")]
            scores = [-x["sums"] / np.maximum(x["weights"], 1e-30) for x in both]
            weights = np.concatenate([x["weights"] > 0 for x in both])
            positive = np.arange(len(weights)) < len(scores[0])
            shown = np.concatenate(scores)[weights], positive[weights], np.ones(weights.sum())
            found[name] = {"membership_auc": area(*shown)}
        return found

    def answers(self, name: str) -> dict[str, Any]:
        """The figures of a variant's outputs."""
        found: dict[str, Any] = {}
        for own, prefix in self._totals:
            if own == name and prefix not in _KINDS:
                found |= {prefix + k: x for k, x in self._results(name, prefix).items()}
        found |= self._results(name, "related")
        if (name, "attribution") in self._totals:
            found |= self._results(name, "attribution")
        if self._tested and name != self.first:
            first, own = (self._results(n, "paired") for n in (self.first, name))
            found["paired"] = {k: paired_test(first[k], own[k]) for k in own}
        return found

    def _begin(self, batch: Batch) -> None:
        """Compiles, before anything of it is in a cache."""
        self.batch = batch
        for name, params in self.variants.items() if self._compiles else ():
            begin = time.perf_counter()
            compiled = lowered(self.fn, self._on_fallback, params, batch.inputs).compile()
            self.compiled[name] = {"compile_seconds": time.perf_counter() - begin}
            memory = compiled.memory_analysis()
            if memory is not None:
                parts = "argument", "output", "temp"
                peak = sum(getattr(memory, f"{part}_size_in_bytes") for part in parts)
                self.compiled[name]["peak_bytes"] = peak - memory.alias_size_in_bytes

    def _attribute(self, batch: Batch, reference: PyTree) -> None:
        """Gradients of the score of the first variant's answer."""
        picked = answers(reference) if are_scores(reference, batch.targets) else None
        slopes, first = input_gradients(self.fn, self._on_fallback), None
        weights = batch.weights
        if weights is not None and weights.ndim > 1:
            weights = jnp.any(jnp.reshape(weights > 0, (len(weights), -1)), axis=1)
        for name, params in self.variants.items():
            own = call(slopes, self._on_fallback, params, (batch.inputs, picked))
            first = own if first is None else first
            self._add(name, "attribution", ATTRIBUTION, own, first, weights)

    def _add(
        self,
        name: str,
        kind: str,
        metrics: tuple[Metric, ...],
        outputs: PyTree,
        targets: PyTree,
        weights: jax.Array | None,
    ) -> None:
        if metrics:
            self._totals.setdefault((name, kind), Totals(metrics)).add(outputs, targets, weights)

    def _results(self, name: str, kind: str) -> dict[str, Any]:
        return self._totals[name, kind].results()


_KINDS = ("paired", "related", "losses", "members", "attribution")


def _alike(first: PyTree, params: PyTree) -> bool:
    """Whether two trees have the same parameters, so that these can be compared."""
    shapes = [
        {path: tuple(w.shape) for path, w in named_leaves(tree) if hasattr(w, "shape")}
        for tree in (first, params)
    ]
    return shapes[0] == shapes[1]


def _costs(measured: _Measured, name: str) -> dict[str, Any]:
    """The cost of a variant, as far as shapes and its program tell."""
    assert measured.batch is not None
    params, inputs = measured.variants[name], measured.batch.inputs
    size, whole = nbytes(params), nbytes(measured.first_params)
    found: dict[str, Any] = {"stored_bytes": size}
    found |= {"ratio": whole / size} if size else {}
    found["resident_bytes"] = resident_bytes(params)
    used, leaves = uses(measured.fn, params, *inputs), dict(named_leaves(params))
    flops = [product_flops(each, leaves[path]) for path, each in used.items()]
    moved = moved_bytes(used, params, inputs, measured.outputs[name])
    energy = picojoules(used, params, moved)
    if energy is not None:
        found["flops"] = sum(n or 0 for n in flops)
    found["moved_bytes"] = moved
    if energy is not None:
        found["microjoules"] = energy / 1e6
    return found | measured.compiled.get(name, {})


def _times(measured: _Measured, rounds: int) -> dict[str, dict[str, object]]:
    """By variant, the median of a call's time, and of its ratio to the first one's of a round."""
    if rounds < 1:
        return {}
    assert measured.batch is not None
    inputs, targets = measured.batch.inputs, measured.batch.targets
    inputs = jax.tree.map(lambda x: jnp.asarray(x) if hasattr(x, "shape") else x, inputs)
    calls = {
        name: functools.partial(measured.run, params, inputs)
        for name, params in measured.variants.items()
    }
    found: dict[str, dict[str, object]] = {}
    samples = interleave(calls, rounds, warmup=1)
    for name, each in samples.items():
        estimate = median([1e3 * s for s in each.wall])
        found[name] = {"milliseconds": estimate._asdict()}
        if name != measured.first:
            first = samples[measured.first].wall
            ratio = median([own / other for own, other in zip(each.wall, first, strict=True)])
            noise = ratio.low <= 1 <= ratio.high
            found[name]["time_ratio"] = {**ratio._asdict(), "noise": noise}
        shapes = [x.shape for x in jax.tree.leaves(targets) if getattr(x, "shape", ())]
        if shapes:
            found[name]["examples_per_second"] = 1e3 * shapes[0][0] / estimate.median
    return found
