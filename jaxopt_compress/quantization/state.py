"""The grid of one quantized parameter."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import (
    FakeQuantizedArray,
    MaskedArray,
    QuantizedArray,
    SparseArray,
)
from jaxopt_compress.arrays.quantized import steps_of
from jaxopt_compress.compression import LeafState
from jaxopt_compress.compression.leaf_states import GRID, N_M, RANK, ZEROS
from jaxopt_compress.numerics.codes import encode, round_to_grid
from jaxopt_compress.numerics.formats import Format
from jaxopt_compress.numerics.groups import Cuts, cuts_of, spread_to
from jaxopt_compress.numerics.ordering import computed_after
from jaxopt_compress.numerics.packing import pack
from jaxopt_compress.numerics.steps import (
    step_value,
)
from jaxopt_compress.quantization.checks import check_known
from jaxopt_compress.quantization.straight_through import fake_quantize, rounded_later
from jaxopt_compress.typing import Leaf, PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "zero", "seen", "key", "active"],
    meta_fields=["format", "reduce", "stack", "axis", "group_size", "block", "tile", "clips"],
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
        format: The number format.
        reduce: Negative axes that share a step.
        stack: Negative axes whose entries are parameters of their own.
        axis: The negative axis along which codes are grouped and packed, or None for a scalar.
        group_size: Entries per group, or None.
        block: Entries per block of packed words, or None.
        tile: ``(negative axis, entries)`` of groups along a second axis, or None.
        clips: Whether entries beyond the range get no gradient.
    """

    format: Format
    reduce: tuple[int, ...]
    stack: tuple[int, ...]
    axis: int | None
    group_size: int | None = None
    block: int | None = None
    tile: tuple[int, int] | None = None
    clips: bool = True
    scale: Any = None
    zero: Any = None
    seen: Any = None
    key: Any = None
    active: Any = None
    kind = "quantize"
    establishes = frozenset({GRID})

    @property
    def keeps(self) -> frozenset[str]:
        """Zeros where the grid has one; and factors stay factors."""
        return keeps_on(self.format)

    def why_lost(self, name: str) -> str | None:
        """Names the format."""
        return why_lost_on(self.format, name)

    @property
    def grid(self) -> "QuantizedState":
        """Itself; states with learned steps hold one."""
        return self

    def current(self, learned: PyTree) -> "QuantizedState":
        """The grid with its present steps."""
        del learned
        return self

    @property
    def cuts(self) -> Cuts:
        """The axes that are cut into groups."""
        return cuts_of(self.axis, self.group_size, self.tile)

    def apply(self, w: Leaf, learned: PyTree) -> jax.Array:
        """``w`` rounded to the grid, or ``w`` itself before quantization begins."""
        del learned
        w = dense(w)
        grid, noise = self.spread(w.shape), _noise(self.key, w.shape)
        view = fake_quantize(w, *grid, noise, self.format, self.clips)
        return view if self.active is None else jnp.where(self.active, view, w)

    def before(self, g: jax.Array) -> jax.Array:
        """``g`` itself, computed after the steps."""
        steps = self.scale.scale if isinstance(self.scale, QuantizedArray) else self.scale
        return computed_after(g, step_value(steps))

    def fake_quantized(self, w: Leaf, learned: PyTree) -> FakeQuantizedArray:
        """As `apply`, rounded only where products use it.

        The nearest code of a weight is computed there, so that there is no dense copy of all
        weights; stochastic rounding is done here.
        """
        values = dense(w) if self.key is None else self.apply(w, learned)
        if self.key is None and self.clips:
            values = rounded_later(values, *self.spread(values.shape), self.format)
        return self.gridded(values)

    def gridded(self, values: jax.Array) -> FakeQuantizedArray:
        """Values with their grid, which they are on or are rounded to."""
        zero = None if self.zero is None else self.zero.astype(jnp.float32)
        return FakeQuantizedArray(self._form(values, values.dtype).replace(zero=zero))

    def compress(self, w: Leaf, learned: PyTree, path: str) -> Any:
        """Codes and grid; the codes of a sparse array stay sparse."""
        del learned
        if self.active is not None:
            check_known(path, self.active)
            if not bool(jnp.all(self.active)):
                return w
        full = dense(w)
        codes = _codes(full, self.scale, self.zero, self.key, self.cuts, self.format)
        if isinstance(w, SparseArray):
            return self._form(w.with_entries(codes), full.dtype)
        return self.holding(codes, full.dtype)

    def _form(self, codes: Any, dtype: Any) -> QuantizedArray:
        return QuantizedArray(
            codes,
            self.scale,
            self.zero,
            np.dtype(dtype),
            self.format.name,
            self.axis,
            self.group_size,
            None,
            self.tile,
        )

    def holding(self, codes: jax.Array, dtype: Any) -> QuantizedArray:
        """Codes, one per entry, on this grid; in words where the format is packed."""
        small = self._form(codes, dtype)
        if self.block is None or self.axis is None:
            return small
        words = pack(codes, self.format.bits, self.axis, self.block)
        return small.replace(codes=words, block=self.block)

    def spread(self, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array | None]:
        """Float32 steps and zero points that broadcast against an array of a shape."""
        return _spread(self.scale, self.zero, self.cuts, shape)


def _spread(
    scale: Any, zero: Any, cuts: Cuts, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array | None]:
    """Float32 steps and zero points that broadcast against a parameter."""
    wide = lambda x: None if x is None else spread_to(x, cuts, shape)
    return spread_to(steps_of(scale), cuts, shape), wide(zero)


def _noise(key: Any, shape: tuple[int, ...]) -> jax.Array | None:
    return None if key is None else jax.random.uniform(key, shape)


class OnGrid(LeafState):
    """The base of states whose views are on a grid that something else decides, or trains.

    Attributes:
        grid: The grid.
    """

    grid: QuantizedState
    establishes = frozenset({GRID})

    @property
    def keeps(self) -> frozenset[str]:
        """As of the grid."""
        return self.grid.keeps

    def why_lost(self, name: str) -> str | None:
        """As of the grid."""
        return self.grid.why_lost(name)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _codes(w: Leaf, scale: Any, zero: Any, key: Any, cuts: Cuts, fmt: Format) -> jax.Array:
    """The codes of a parameter; compiled as one, so that no float array is made on the way."""
    noise = _noise(key, w.shape)
    levels, _ = round_to_grid(w, *_spread(scale, zero, cuts, w.shape), fmt, noise)
    return encode(levels, fmt)


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


def dense(w: Leaf) -> jax.Array:
    """A pruned parameter as a dense one; others as they are."""
    return w.materialize() if isinstance(w, SparseArray | MaskedArray) else w


def keeps_on(fmt: Format) -> frozenset[str]:
    """The properties of a parameter that rounding to a format keeps."""
    return frozenset({ZEROS, N_M, RANK} if fmt.has_zero else {RANK})


def why_lost_on(fmt: Format, name: str) -> str | None:
    """Why rounding to a format loses a property."""
    if name in (ZEROS, N_M):
        return (
            f"{fmt.name!r} has no code for 0.0; choose a format that has one, such as 'ternary' or "
            "'int2'"
        )
    if name == GRID:
        return "the second grid replaces the first; keep one of the two"
    return None
