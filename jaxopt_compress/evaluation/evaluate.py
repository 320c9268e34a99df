"""Metrics of a function over batches."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.evaluation.corruptions import Corruptions, check_corruptions, versions
from jaxopt_compress.evaluation.metrics import Metric, Metrics, checked
from jaxopt_compress.lift import lift
from jaxopt_compress.lift.interpreter import OnFallback
from jaxopt_compress.tree.meshes import on_auto_axes
from jaxopt_compress.typing import Leaf, PyTree


class Batch(NamedTuple):
    """A batch as functions and metrics take it.

    Attributes:
        inputs: The arguments after the parameters.
        targets: What the outputs are compared with.
        weights: The weights of the examples, or None.
    """

    inputs: tuple[PyTree, ...]
    targets: PyTree
    weights: jax.Array | None


def evaluate(
    fn: Callable[..., PyTree],
    params: PyTree,
    batches: Iterable[PyTree],
    metrics: Metrics,
    on_fallback: OnFallback = "warn",
    *,
    corruptions: Corruptions | None = None,
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Measures how good the outputs of a function are.

    Sums over batches are kept, not outputs, where the metric allows it. The function and the sums
    are compiled once per shape of a batch, also over calls with the same ``fn``. To spare the
    last, shorter batch a compilation of its own, fill it up with examples of weight 0.

    Args:
        fn: Any JAX function, called as ``fn(params, *inputs)``. It is lifted here.
        params: A pytree; it may hold compressed arrays.
        batches: An iterable of ``(inputs, targets)`` or ``(inputs, targets, weights)``. ``inputs``
            is a tuple of arguments, or the only one. ``weights`` has the leading axes of the
            targets: one weight per example, at least 0.
        metrics: Names, those of `jaxopt_compress.metrics`, or functions of ``(outputs, targets)``
            that return one value per example, of which the mean is taken. The names are
            ``accuracy``, ``top5``, ``precision_macro``, ``recall_macro``, ``f1_macro`` and the same
            with ``micro``, ``per_class``, ``auc``, ``calibration_error``, ``cross_entropy``,
            ``perplexity``, ``rmse`` and ``spearman``.
        on_fallback: As in `lift`; of a function that is lifted already, its own holds.
        corruptions: Name -> one of `jaxopt_compress.corruptions`: each metric is measured under
            each of them too.
        key: A random key, for corruptions; the same key corrupts in the same way.

    Returns:
        Name -> figure; NaN where no example has a weight. Under a corruption the name is
        ``"corruption/metric"``.

    Raises:
        ValueError: There are no batches or no metrics, a batch is not such a tuple, outputs and
            targets do not fit a metric, or there are corruptions without a key.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jnp.eye(3)}
        >>> small = jc.compress(params, jc.quantize("int8"))
        >>> batches = [(jnp.eye(3), jnp.array([0, 1, 2])), (jnp.eye(3)[:1], jnp.array([2]))]
        >>> jc.evaluate(lambda p, x: x @ p["w"], small, batches, ["accuracy", "f1_macro"])
        {'accuracy': 0.75, 'f1_macro': 0.777...}
    """
    chosen, fn = checked(metrics), hashable(fn)
    under = check_corruptions(corruptions, key)
    totals = {prefix: Totals(chosen) for prefix in ("", *(f"{name}/" for name in under))}
    for i, (inputs, targets, weights) in enumerate(unpacked(batches)):
        for prefix, seen in versions(inputs, under, key, i):
            totals[prefix].add(call(fn, on_fallback, params, seen), targets, weights)
    return {p + name: x for p, each in totals.items() for name, x in each.results().items()}


def unpacked(batches: Iterable[PyTree]) -> Iterable[Batch]:
    """The parts of each batch.

    Raises:
        TypeError: ``batches`` is one array.
        ValueError: There are none, or one is neither a pair nor a triple.
    """
    if hasattr(batches, "shape"):
        raise TypeError("batches is one array; pass an iterable of (inputs, targets)")
    count = 0
    for count, batch in enumerate(batches, 1):
        if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
            found = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch)
            raise ValueError(
                f"batch {count - 1} is {found}: a batch is (inputs, targets) or (inputs, targets, "
                "weights), and several inputs are a tuple, ((x, mask), targets)"
            )
        inputs, targets, *rest = batch
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        yield Batch(inputs, targets, rest[0] if rest else None)
    if not count:
        raise ValueError("batches is empty: there is nothing to measure")


def call(
    fn: Callable[..., PyTree], on_fallback: OnFallback, params: PyTree, inputs: tuple[PyTree, ...]
) -> PyTree:
    """Calls ``fn`` lifted and compiled, once per types of its arguments.

    Everything but arrays in the arguments is static.
    """
    return _compiled_call(fn, on_fallback, *_split(params, inputs))


def lowered(
    fn: Callable[..., PyTree], on_fallback: OnFallback, params: PyTree, inputs: tuple[PyTree, ...]
) -> Any:
    """As `call`, up to compilation."""
    return _compiled_call.lower(fn, on_fallback, *_split(params, inputs))


def _split(
    params: PyTree, inputs: tuple[PyTree, ...]
) -> tuple[Any, tuple[object, ...], list[Leaf]]:
    """The structure of arguments, their static parts, and the arrays."""
    leaves, treedef = jax.tree.flatten((params, inputs))
    arrays = [x if hasattr(x, "shape") else None for x in leaves]
    return treedef, tuple(None if hasattr(x, "shape") else x for x in leaves), arrays


# Functions are keys of the cache, so that later calls find what earlier ones compiled.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _compiled_call(
    fn: Callable[..., PyTree],
    on_fallback: OnFallback,
    treedef: Any,
    static: tuple[object, ...],
    arrays: list[Leaf],
) -> PyTree:
    leaves = [s if a is None else a for s, a in zip(static, arrays, strict=True)]
    params, inputs = jax.tree.unflatten(treedef, leaves)
    lifted = fn if getattr(fn, "is_lifted", False) else lift(fn, on_fallback)
    return lifted(params, *inputs)


def hashable(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """``fn``, or the same function under a new identity if it cannot be a key."""
    try:
        hash(fn)
    except TypeError:
        return lambda *args: fn(*args)
    return fn


@functools.partial(jax.jit, static_argnums=0)
def _measured(
    metrics: tuple[Metric, ...], outputs: PyTree, targets: PyTree, weights: jax.Array | None
) -> list[PyTree]:
    return [m.measure(outputs, targets, weights) for m in metrics]


class Totals:
    """The sums of metrics so far.

    Sums come to the host one batch late, so that it prepares a batch while devices compute.
    """

    def __init__(self, metrics: tuple[Metric, ...]):
        self._metrics = metrics
        # A metric that sums keeps one tree at most.
        self._found: list[list[PyTree]] = [[] for _ in metrics]
        self._pending: PyTree = None

    def add(self, outputs: PyTree, targets: PyTree, weights: jax.Array | None) -> None:
        """Measures the outputs of a batch."""
        run = functools.partial(_measured, self._metrics)
        found = on_auto_axes(run, outputs, targets, weights)
        self._fold()
        self._pending = found

    def results(self) -> dict[str, float]:
        """Name -> figure."""
        self._fold()
        join = lambda part, *parts: np.concatenate((part, *parts)) if parts else part
        pairs = zip(self._metrics, self._found, strict=True)
        trees = [(m, jax.tree.map(join, found[0], *found[1:])) for m, found in pairs]
        return {metric.name: _figure(metric.result(tree)) for metric, tree in trees}

    def _fold(self) -> None:
        if self._pending is None:
            return
        for metric, found, new in zip(self._metrics, self._found, self._pending, strict=True):
            new = jax.tree.map(_wide, new)
            if found and not metric.keep:
                found[0] = jax.tree.map(np.add, found[0], new)
            else:
                found.append(new)
        self._pending = None


def _figure(found: Any) -> Any:
    """A number, or a table of them as it is."""
    return dict(found) if isinstance(found, Mapping) else float(found)


def _wide(x: Leaf) -> np.ndarray:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return np.asarray(x).astype(np.float64 if floating else np.int64)
