"""The grid of one quantized parameter."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import (
    GriddedArray,
    InputQuantizedArray,
    QuantizedArray,
    SparseArray,
)
from jaxopt_compress.arrays.quantized import steps_of
from jaxopt_compress.compression import LeafState
from jaxopt_compress.numerics.bounds import Bounds
from jaxopt_compress.numerics.codes import encode, round_to_grid
from jaxopt_compress.numerics.formats import Format
from jaxopt_compress.numerics.groups import Cuts, by_groups, cuts_of, spread_to
from jaxopt_compress.numerics.ordering import computed_after
from jaxopt_compress.numerics.packing import pack
from jaxopt_compress.numerics.steps import (
    float8_steps,
    power_of_two_step,
    shorter_steps,
    step_of,
    step_value,
)
from jaxopt_compress.quantization.checks import check_known
from jaxopt_compress.quantization.straight_through import fake_quantize, rounded_later
from jaxopt_compress.tree.meshes import reduced_on_auto_axes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "zero", "seen", "key", "active", "input_scale"],
    meta_fields=[
        "format",
        "reduce",
        "stack",
        "axis",
        "group",
        "block",
        "tile",
        "inputs",
        "gradients",
        "residuals",
        "clips",
    ],
)
@dataclasses.dataclass(frozen=True)
class QuantizedState(LeafState):
    """What was decided for one parameter.

    Attributes:
        scale: Steps, as `QuantizedArray` stores them.
        zero: Integer zero points, or None if symmetric.
        seen: ``(low, high)``, the range so far where it is averaged over updates, or None.
        key: The random key of stochastic rounding, or None.
        active: Whether quantization has begun, a boolean; None if it always has.
        input_scale: Steps of the activations that meet the parameter, or None.
        format: The number format.
        reduce: Negative axes that share a step.
        stack: Negative axes whose entries are parameters of their own.
        axis: The negative axis along which codes are grouped and packed, or None for a scalar.
        group: Entries per group, or None.
        block: Entries per block of packed words, or None.
        tile: ``(negative axis, entries)`` of groups along a second axis, or None.
        inputs: The number format of the activations that meet the parameter, or None.
        gradients: The number format of cotangents on their way back through its products, or None.
        residuals: Which factors derivatives of its products are taken at.
        clips: Whether entries beyond the range get no gradient.
    """

    format: Format
    reduce: tuple[int, ...]
    stack: tuple[int, ...]
    axis: int | None
    group: int | None = None
    block: int | None = None
    tile: tuple[int, int] | None = None
    inputs: str | None = None
    gradients: str | None = None
    residuals: str = "rounded"
    clips: bool = True
    scale: Any = None
    zero: Any = None
    seen: Any = None
    key: Any = None
    active: Any = None
    input_scale: Any = None

    @property
    def kind(self) -> str:
        """The method's name; nothing may follow one whose view is no array."""
        return "quantize in products" if self.needs_lift else "quantize"

    @property
    def needs_lift(self) -> bool:
        """Whether products do more than read weights: to activations, or on the way back."""
        return self.inputs is not None or self.residuals != "rounded"

    @property
    def keeps_zeros(self) -> bool:
        """Whether 0.0 stays 0.0, so that pruned entries do."""
        return self.format.has_zero

    @property
    def grid(self) -> "QuantizedState":
        """Itself; states with learned steps hold one."""
        return self

    def current(self, learned: Any) -> "QuantizedState":
        """The grid with its present steps."""
        del learned
        return self

    @property
    def cuts(self) -> Cuts:
        """The axes that are cut into groups."""
        return cuts_of(self.axis, self.group, self.tile)

    def apply(self, w: Any, learned: Any) -> jax.Array:
        """``w`` rounded to the grid, or ``w`` itself before quantization begins."""
        del learned
        w = dense(w)
        view = fake_quantize(w, *self._grid(w), self._noise(w), self.format, self.clips)
        return view if self.active is None else jnp.where(self.active, view, w)

    def before(self, g: jax.Array) -> jax.Array:
        """``g`` itself, computed after the steps."""
        steps = self.scale.scale if isinstance(self.scale, QuantizedArray) else self.scale
        return computed_after(g, step_value(steps))

    def view(self, w: Any, learned: Any) -> Any:
        """What a forward pass uses: as `apply`, or with what else its products do."""
        if not self.needs_lift:
            return self.apply(w, learned)
        # What rounding to the nearest makes of a weight is left to where it is used: no dense copy.
        values = dense(w) if self.key is None else self.apply(w, learned)
        if self.key is None and self.clips:
            values = rounded_later(values, *self._grid(values), self.format)
        return InputQuantizedArray(
            self.gridded(values),
            self.input_scale,
            self.inputs,
            gradients=self.gradients,
            residuals="unrounded" if self.residuals == "unrounded" else "rounded",
        )

    def gridded(self, values: jax.Array) -> GriddedArray:
        """Values with the grid that they lie on, or are rounded to."""
        zero = None if self.zero is None else self.zero.astype(jnp.float32)
        return GriddedArray(self._form(values, values.dtype).replace(zero=zero))

    def compress(self, w: Any, learned: Any, path: str) -> Any:
        """Codes and grid; the codes of a sparse array stay sparse."""
        del learned
        if self.active is not None:
            check_known(path, self.active)
            if not bool(jnp.all(self.active)):
                return w
        small = self._stored(w)
        if self.inputs is None:
            return small
        return InputQuantizedArray(small, self.input_scale, self.inputs)

    def _form(self, codes: Any, dtype: Any) -> QuantizedArray:
        return QuantizedArray(
            codes,
            self.scale,
            self.zero,
            np.dtype(dtype),
            self.format.name,
            self.axis,
            self.group,
            None,
            self.tile,
        )

    def _stored(self, w: Any) -> QuantizedArray:
        full = dense(w)
        levels, _ = round_to_grid(full, *self._grid(full), self.format, self._noise(full))
        codes = encode(levels, self.format)
        if isinstance(w, SparseArray):
            return self._form(w.with_entries(codes), full.dtype)
        small = self._form(codes, full.dtype)
        if self.block is None or self.axis is None:
            return small
        words = pack(codes, self.format.bits, self.axis, self.block)
        return small.replace(codes=words, block=self.block)

    def _grid(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Float32 steps and zero points that broadcast against ``w``."""
        wide = lambda x: None if x is None else spread_to(x, self.cuts, w.shape)
        return spread_to(steps_of(self.scale), self.cuts, w.shape), wide(self.zero)

    def _noise(self, w: jax.Array) -> jax.Array | None:
        return None if self.key is None else jax.random.uniform(self.key, w.shape)


class Rule(NamedTuple):
    """How steps follow from values.

    Attributes:
        bounds: Which range the grid covers.
        symmetric: Whether it is centred on 0.
        scale: The dtype that holds steps.
    """

    bounds: Bounds
    symmetric: bool
    scale: str

    def clips(self, fmt: Format) -> bool:
        """Whether the range that follows from values may leave some of them out."""
        # A step of few bits may be rounded down to one too small for the largest magnitude.
        return not fmt.absmean and (self.bounds.clips or self.scale.startswith("float8"))


def measured(state: QuantizedState, w: Any, rule: Rule) -> QuantizedState:
    """The state with the steps that follow from the values of a parameter."""
    fmt = state.format

    def range_of(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        if not x.size:
            empty = jnp.zeros([1 if d in axes else n for d, n in enumerate(x.shape)])
            return empty, empty

        def view(low: jax.Array, high: jax.Array) -> jax.Array:
            return fake_quantize(x, *step_of(low, high, fmt, rule.symmetric), None, fmt)

        return rule.bounds.measure(x, axes, fmt, rule.symmetric, view)

    whole = dense(w).astype(jnp.float32)
    low, high = reduced_on_auto_axes(
        lambda x: by_groups(range_of, x, state.reduce, state.cuts), whole
    )
    decay = rule.bounds.decay
    if decay is not None:
        if state.seen is not None:
            low, high = (
                decay * old + (1 - decay) * new
                for old, new in zip(state.seen, (low, high), strict=True)
            )
        state = dataclasses.replace(state, seen=(low, high))
    relative = rule.scale == "float8_e4m3fn"
    # Among steps that share one, a group of zeros is not to set the range of all.
    step, zero = step_of(low, high, fmt, rule.symmetric, 0.0 if relative else None)
    if rule.scale == "float8_e8m0fnu":
        step = power_of_two_step(low, high, fmt)
    elif relative:
        shared = tuple(d for d in range(-step.ndim, 0) if d not in state.stack)
        codes, outer = float8_steps(step, shared)
        step = QuantizedArray(codes, outer, None, np.dtype(np.float32), rule.scale, None)
    elif rule.scale != "float32":
        step = shorter_steps(step, rule.scale)
    return dataclasses.replace(state, scale=step, zero=zero)


def per_stack(x: jax.Array, shape: tuple[int, ...], stack: tuple[int, ...]) -> jax.Array:
    """Values of the activations that meet a parameter, in its rank.

    Args:
        x: ``[*stack]`` if there is one for each entry of the stack; otherwise the largest is taken.
        shape: The shape of the parameter.
        stack: Its negative stack axes.
    """
    sizes = [n if d - len(shape) in stack else 1 for d, n in enumerate(shape)]
    if x.shape == tuple(n for n in sizes if n > 1):
        return x.reshape(sizes)
    return jnp.max(x).reshape([1] * len(shape))


def dense(w: Any) -> jax.Array:
    """A sparse parameter as a dense one; others as they are."""
    return w.materialize() if isinstance(w, SparseArray) else w
