"""Statistics of the activations that meet one parameter."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.tree import Layout
from jaxopt_compress.typing import Value

Result = Callable[[dict[str, jax.Array], jax.Array], jax.Array | dict[str, jax.Array]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "values", "held_out"],
    meta_fields=["contracting", "results", "of_gradients", "window", "stack"],
)
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of the vectors that a parameter's contracted axes meet.

    ``k`` is the number of entries of the contracted axes, in row-major order of the parameter's own
    axes (of a convolution: of one patch). Parameters that are scanned over or batched, and grouped
    convolutions, have leading stack axes: one set of statistics per slice. A slice that met no row,
    such as an expert that no token went to, has means, ranges and moments of 0.

    Attributes:
        rows: int32 ``[*stack]``, how many vectors were seen.
        values: Name of a measure -> its running sums and extremes, by their names.
        contracting: The contracted axes, negative; static.
        results: ``(name, result)`` for each measure: what makes its finished value; static.
        held_out: Statistics of the same parameter on other data, or None.
        of_gradients: The names of the measures of gradients, not of activations; static.
        window: The contracted axes that the window of a convolution spans; static.
        stack: The parameter's axes that the leading ones of `rows` are, negative and sorted; () if
            they are none of its own, such as the groups of a convolution; static.
    """

    rows: Value
    values: dict[str, dict[str, Value]]
    contracting: tuple[int, ...]
    results: tuple[tuple[str, Result | None], ...] = ()
    held_out: "Statistics | None" = None
    of_gradients: tuple[str, ...] = ()
    window: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()

    def has(self, name: str) -> bool:
        """Whether the measure ``name`` was taken."""
        return name in self.values

    def value(self, name: str) -> Value:
        """The finished value of a measure; its sums and extremes if it has no ``result``.

        Raises:
            ValueError: The measure was not taken.
        """
        if not self.has(name):
            known = name in ("moments", "ranges", "means", "zeros", "fisher")
            add = f"jc.measures.{name}()" if known else f"the Measure of the name {name!r}"
            raise ValueError(
                f"these statistics have no {name!r}, but {', '.join(self.values) or 'none'}: take "
                f"it too, by calibrate(..., measures=({add}, ...))"
            )
        result, values = dict(self.results).get(name), self.values[name]
        if result is None:
            return values
        # Known statistics stay known inside of jit, so that checks can read them.
        traced = any(map(is_traced, jax.tree.leaves((values, self.rows))))
        with contextlib.nullcontext() if traced else jax.ensure_compile_time_eval():
            return result(values, self.rows)

    def check_finite(self, parameter: str, *measures: str) -> None:
        """Refuses activations that were infinite or NaN, where their statistics are known.

        A solver would take them for no statistics at all, or pass them on to weights.

        Args:
            parameter: What is met, for the message.
            *measures: Those that are read.

        Raises:
            ValueError: Names the parameter and the measure.
        """
        known = lambda x: isinstance(x, jax.Array | np.ndarray) and not is_traced(x)
        for name in measures:
            arrays = jax.tree.leaves((self.values.get(name), self.rows))
            if not self.has(name) or not all(map(known, arrays)):
                continue
            with jax.ensure_compile_time_eval():
                # Finished ones: the range of an expert that met no row begins as infinite.
                arrays = jax.tree.leaves(self.value(name))
                finite = all(bool(jnp.all(jnp.isfinite(x))) for x in arrays)
            if not finite:
                raise ValueError(
                    f"the {name} measured for {parameter} are infinite or NaN: calibrate on "
                    "batches whose activations are finite, without rows that are padding alone, or "
                    "leave the parameter out by where="
                )

    def through(self, inputs: jax.Array | None, contracting: tuple[int, ...]) -> "Statistics":
        """The statistics of ``x @ inputs`` instead of ``x``, as far as they follow.

        Args:
            inputs: ``[*stack, k, r]``, or None for ``x`` itself.
            contracting: The contracted axes of the activation.

        Returns:
            Statistics with the moments that these have, and means without mean magnitudes. Ranges
            and other measures do not follow, and are left out; with None all stay but those of
            gradients, which are of the whole parameter.
        """
        held = None if self.held_out is None else self.held_out.through(inputs, contracting)
        if inputs is None:
            kept = {k: v for k, v in self.values.items() if k not in self.of_gradients}
            names = tuple(pair for pair in self.results if pair[0] in kept)
            new = Statistics(self.rows, kept, contracting, names, held)
            same = contracting == self.contracting
            return dataclasses.replace(new, window=self.window, stack=self.stack) if same else new
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        a = inputs.astype(jnp.float32)
        values: dict[str, dict[str, Value]] = {}
        if self.has("moments"):
            outer = self.values["moments"]["outer"]
            values["moments"] = {"outer": product(product(jnp.swapaxes(a, -2, -1), outer), a)}
        if self.has("means"):
            total = self.values["means"]["mean"]
            values["means"] = {"mean": product(total[..., None, :], a)[..., 0, :]}
        results = tuple((name, result) for name, result in self.results if name in values)
        return Statistics(self.rows, values, contracting, results, held)

    @property
    def mean(self) -> jax.Array:
        """``[*stack, k]``: the mean; from ``means()``."""
        return self.value("means")["mean"]

    @property
    def mean_magnitude(self) -> jax.Array:
        """``[*stack, k]``: the mean of the magnitudes; from ``means()``."""
        found = self.value("means")
        if "mean_magnitude" not in found:
            raise ValueError(
                "mean magnitudes of a factor's inputs do not follow from those of the whole"
            )
        return found["mean_magnitude"]

    @property
    def low(self) -> jax.Array:
        """``[*stack, k]``: the smallest entries; from ``ranges()``."""
        return self.value("ranges")["low"]

    @property
    def high(self) -> jax.Array:
        """``[*stack, k]``: the largest entries; from ``ranges()``."""
        return self.value("ranges")["high"]

    @property
    def absmax(self) -> jax.Array:
        """``[*stack, k]``: the largest magnitudes; from ``ranges()``."""
        return jnp.maximum(jnp.abs(self.low), jnp.abs(self.high))

    @property
    def second_moment(self) -> jax.Array:
        """``[*stack, k, k]``: the mean of the outer products, ``E[x x^T]``; from ``moments()``."""
        return self.value("moments")

    @property
    def zero_fraction(self) -> jax.Array:
        """``[*stack, k]``: the fraction of entries that are exactly 0; from ``zeros()``."""
        return self.value("zeros")

    @property
    def fisher(self) -> jax.Array:
        """The mean of squared gradients, in the parameter's shape; from ``fisher()``."""
        return self.value("fisher")


Stats: TypeAlias = Mapping[str, Sequence[Statistics]]
"""The result of `calibrate`: statistics for each use of a parameter, by path."""


def statistics_for(
    stats: Mapping[str, Sequence[Statistics]] | None, path: str, layout: Layout
) -> Statistics | None:
    """The statistics of the products that sum over the axes that ``layout`` sums over.

    Args:
        stats: What `calibrate` returned, or None.
        path: The path of the parameter.
        layout: The roles of its axes.

    Returns:
        The entry of ``stats[path]`` with the contracting axes of ``layout``; if there are several,
        one that tells the entries of its stack apart, if any does; then the one met first.
        If there is none, an entry of measures of gradients alone; None if there is neither.
    """
    found = [] if stats is None else stats.get(path, ())
    axes = sorted(layout.contracting)
    fitting = [s for s in found if sorted(s.contracting) == axes]
    alone = [s for s in found if not s.contracting]
    apart = [s for s in fitting if jnp.ndim(s.rows) == len(layout.stack)]
    return next(iter([*apart, *fitting, *alone]), None)
