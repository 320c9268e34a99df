"""Codes that a solver has found for one parameter, and what solvers have in common."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import (
    FakeQuantizedArray,
    InputQuantizedArray,
    MaskedArray,
    ScaledArray,
    SparseArray,
)
from jaxopt_compress.compression import Decision, LeafMethod, LeafState, NeedsStats, Parameter
from jaxopt_compress.compression.leaf_states import GRID
from jaxopt_compress.compression.matrices import Matrices, matrices_of
from jaxopt_compress.numerics.bounds import Bounds, absmax
from jaxopt_compress.numerics.codes import encode
from jaxopt_compress.numerics.formats import Format
from jaxopt_compress.numerics.groups import grouped
from jaxopt_compress.numerics.ranges import least_squares
from jaxopt_compress.numerics.solvers.grids import Grid
from jaxopt_compress.quantization.rule import Rule, measured, rule_of
from jaxopt_compress.quantization.state import (
    QuantizedState,
    dense,
    keeps_on,
    why_lost_on,
)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["stored"], meta_fields=["format", "kind"]
)
@dataclasses.dataclass(frozen=True)
class SolvedState(LeafState):
    """The stored form of one parameter, which no update changes.

    The view does not depend on the parameter any more: its derivative is 0, and training moves what
    else there is, such as biases and norms.

    Attributes:
        stored: A `QuantizedArray`, or a form around one that also says how activations are rounded.
        format: The number format of the weight.
        kind: The name of the method.
    """

    stored: Any
    format: Format
    kind: str
    establishes = frozenset({GRID})

    @property
    def keeps(self) -> frozenset[str]:
        """Zeros where the grid has one; and factors stay factors."""
        return keeps_on(self.format)

    def why_lost(self, name: str) -> str | None:
        """Names the format."""
        return why_lost_on(self.format, name)

    def apply(self, w: Any, learned: Any) -> jax.Array:
        """The values of the codes."""
        del w, learned
        return self.stored.materialize()

    def fake_quantized(self, w: Any, learned: Any) -> FakeQuantizedArray:
        """As `apply`, with the grid of the values."""
        values, zero = self.apply(w, learned), self.stored.zero
        zero = None if zero is None else zero.astype(jnp.float32)
        return FakeQuantizedArray(self.stored.replace(codes=values, zero=zero, block=None))

    def compress(self, w: Any, learned: Any, path: str) -> Any:
        """The stored form; of a sparse array, with sparse codes."""
        del learned, path
        return _sparse_as(w, self.stored) if isinstance(w, SparseArray) else self.stored


def _sparse_as(w: SparseArray, stored: Any) -> Any:
    """A stored form with the entries of its codes that a sparse array has."""
    if isinstance(stored, ScaledArray):
        return stored.replace(array=_sparse_as(w, stored.array))
    if isinstance(stored, InputQuantizedArray):
        return stored.replace(weight=_sparse_as(w, stored.weight))
    return stored.replace(codes=w.with_entries(stored.unpacked()), block=None)


Solve = Callable[[jax.Array, jax.Array, Grid], jax.Array]


def solved(kind: str, weights: LeafMethod, solve: Solve, weigh: Rule | None = None) -> LeafMethod:
    """The method that takes the grid from another one, and the codes from a solver.

    Args:
        kind: The method's name.
        weights: `quantize_method`.
        solve: ``solve(w, moment, grid) -> levels``, of matrices ``[*lead, k, n]`` and second
            moments ``[*lead, k, k]``.
        weigh: The rule for grids whose range leaves the least squared error, each counted by the
            mean square of the input that it meets; None for the range that ``weights`` decides.
    """

    def check(parameter: Parameter) -> None:
        weights.check(parameter)
        check_stats(kind, parameter, "moments")

    def init(parameter: Parameter) -> Decision:
        state: QuantizedState = weights.init(parameter).state
        value, shape = dense(parameter.value), tuple(parameter.value.shape)
        matrices = matrices_of(shape, parameter.layout, parameter.stats)
        moment = matrices.moment(parameter.stats)
        if weigh is not None:
            squares = matrices.per_input(jnp.diagonal(moment, axis1=-2, axis2=-1))
            state = weighted(state, value, squares, weigh)
        # The error is that of the parameter before it was pruned: what is kept makes up for zeros.
        target = matrices.of(whole(parameter.value))
        levels = solve(target, moment, grid_of(state, parameter, matrices))
        codes = encode(matrices.back(levels), state.format)
        return Decision(SolvedState(state.holding(codes, value.dtype), state.format, kind))

    return LeafMethod(check, init)


def whole(value: Any) -> jax.Array:
    """A parameter that is under a mask as it was before; others as `dense` has them."""
    return value.values if isinstance(value, MaskedArray) else dense(value)


def weighing(
    fmt: Format, bounds: Bounds | None, symmetric: bool, scale_dtype: str | None
) -> Rule | None:
    """The rule for grids that weigh errors by inputs, unless others are asked for."""
    if bounds is not None or fmt.absmean:
        return None
    return rule_of(fmt, (None, None), absmax(), symmetric, scale_dtype)


def grid_of(state: QuantizedState, parameter: Parameter, matrices: Matrices) -> Grid:
    """The grid of each entry of the matrices of a parameter."""
    shape = tuple(parameter.value.shape)
    entries = lambda x: None if x is None else matrices.of(jnp.broadcast_to(x, shape))
    scale, zero = state.spread(shape)
    return Grid(entries(scale), entries(zero), entries(parameter.keep))  # pyright: ignore


@functools.partial(jax.jit, static_argnames="rule")
def weighted(state: QuantizedState, w: jax.Array, weights: jax.Array, rule: Rule) -> QuantizedState:
    """The grid of the range with the least weighted squared error.

    Args:
        state: A grid of the same parameter.
        w: The parameter.
        weights: An array of its shape, at least 0.
        rule: How steps follow from the range; its bounds are not used.
    """
    fine, _, _ = grouped(weights.astype(jnp.float32), state.reduce, state.cuts)
    bounds = Bounds(least_squares(weights=fine))
    return measured(state, w, rule._replace(bounds=bounds))


def check_stats(kind: str, parameter: Parameter, *measures: str) -> None:
    """Refuses statistics that are missing, or not finite.

    Args:
        kind: The method's name.
        parameter: The parameter.
        *measures: The names of the measures that it needs.

    Raises:
        NeedsStats: Names the parameter and what is missing.
        ValueError: They are infinite or NaN.
    """
    stats = parameter.stats
    if stats is not None and stats.contracting and all(map(stats.has, measures)):
        stats.check_finite(parameter.describe(), *measures)
        return
    needed = ", ".join(f"jaxopt_compress.measures.{name}()" for name in measures)
    raise NeedsStats(
        f"{kind} needs {needed} of the activations that meet {parameter.describe()}: pass "
        "stats=jaxopt_compress.calibrate(fn, params, batches), or run compress_in_order. If they "
        "were passed: what is only looked up meets no activations, and calibrate warns of what it "
        "cannot measure; compress these by quantize in another rule of a recipe, or leave them out "
        "by where="
    )
