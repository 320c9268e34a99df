"""Products with quantized arrays as products of matrices, whose operands kernels may read."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import QuantizedArray
from jaxopt_compress.kernels import Operand, Stored
from jaxopt_compress.kernels.decoded import STEPS
from jaxopt_compress.lift.products import Place, Product
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.steps import step_value
from jaxopt_compress.typing import Value

_PLANES = (1, 2, 4)


class Matrices(NamedTuple):
    """A product with a quantized weight as ``[*batch, m, k]`` times ``[*batch, k, n]``.

    Groups and words run along ``k``.

    Attributes:
        rows: The activation, or its codes.
        w: The weight, with one float32 step per group along one axis at most.
        how: The product.
        summed: The axes of the weight that make ``k``, in order.
        free: Those that make ``n``.
        middle: The sizes of the axes of the activation that make ``m``.
    """

    rows: jax.Array
    w: QuantizedArray
    how: Product
    summed: tuple[int, ...]
    free: tuple[int, ...]
    middle: tuple[int, ...]

    def matrix(self, field: jax.Array, transposed: bool = False) -> jax.Array:
        """A field of the weight as matrices, or as their transposes."""
        w, batch = self.w, self.how.batch[1]
        # A field that is whole along some axes of a run has to be whole along all of them.
        full = list(field.shape)
        for d in (*batch, *self.free):
            full[d] = w.shape[d]
        if w.group_size is not None:
            for d in self.summed[:-1]:
                full[d] = w.shape[d]
        field = jnp.broadcast_to(field, full)
        pair = (self.free, self.summed) if transposed else (self.summed, self.free)
        field = jnp.transpose(field, (*batch, *pair[0], *pair[1]))
        sizes = [math.prod(full[d] for d in axes) for axes in pair]
        return field.reshape(*self.rows.shape[: len(batch)], *sizes)

    def result(self, y: jax.Array) -> jax.Array:
        """``[*batch, m, n]`` with the axes of the product."""
        lead, free = y.shape[: len(self.how.batch[1])], [self.w.shape[d] for d in self.free]
        return y.reshape(*lead, *self.middle, *free).astype(self.how.dtype)

    def operand(
        self, held: Stored | None, scale: jax.Array | None = None, transposed: bool = False
    ) -> Operand:
        """The weight.

        Args:
            held: The same for kernels, or None.
            scale: Its steps as matrices, if not those of ``w``.
            transposed: Whether its codes are ``[n, k]`` and stay so.
        """
        w, grid = self.w, self.w.fmt.grid
        # In planar words, which shifts to either side bring to int8.
        signed = isinstance(grid, Integers) and grid.signed
        words = w.block is not None and w.bits in _PLANES and signed
        return Operand(
            self.matrix(w.codes if words else w.unpacked(), transposed),
            self.matrix(w.scale) if scale is None else scale,
            None if w.zero is None else self.matrix(w.zero),
            held,
            format=w.format,
            group=w.group_size,
            block=w.block if words else None,
            transposed=transposed,
        )

    def stored(self, steps: Value) -> Stored | None:
        """The weight in memory, if kernels may read it there; its steps may be quantized."""
        if not self.how.pallas:
            return None
        w = self.w
        transposed, place = lie_of_matrices(w, self.how)
        outer = None
        if isinstance(steps, QuantizedArray):
            steps, outer = steps.codes, self.matrix(steps.scale)[..., :1, :]
        elif steps.dtype.name not in STEPS:
            steps = step_value(steps)

        def held(field: jax.Array) -> jax.Array:
            own = self.matrix(field, transposed)
            if place is None:
                return own
            stack = place.stack_of(field)
            if stack is None or own.size != field.size:
                return own[None]
            return stack.reshape(-1, *own.shape)

        codes, steps, columns = held(w.codes), held(steps), -2 if transposed else -1
        shape = list(steps.shape)
        shape[columns] = codes.shape[columns]
        layer = None if place is None else place.layer.index
        steps = jnp.broadcast_to(steps, shape)
        return Stored(codes, steps, outer, layer, block=w.block, transposed=transposed)


def as_matrices(x: jax.Array, w: QuantizedArray, how: Product) -> Matrices:
    """A product as one of matrices; ``x`` is the activation, or its codes."""
    (x_summed, summed), (x_batch, batch) = how.contract, how.batch
    free = tuple(d for d in range(w.ndim) if d not in summed and d not in batch)
    order = order_of_sums(w, how)
    middle = tuple(n for d, n in enumerate(x.shape) if d not in x_summed and d not in x_batch)
    rows = as_rows(x, [x_summed[i] for i in order], x_batch)
    return Matrices(rows, w, how, tuple(summed[i] for i in order), free, middle)


def as_rows(x: jax.Array, summed: Sequence[int], batch: Sequence[int]) -> jax.Array:
    """``[*batch, m, k]`` of an activation whose product sums over the axes ``summed``."""
    rest = [d for d in range(x.ndim) if d not in batch and d not in summed]
    sizes = [math.prod(x.shape[d] for d in axes) for axes in (rest, summed)]
    lead = [x.shape[d] for d in batch]
    return x.transpose(*batch, *rest, *summed).reshape(*lead, *sizes)


def lie_of_matrices(w: QuantizedArray, how: Product) -> tuple[bool, Place | None]:
    """Whether a weight is stored as matrices ``[n, k]``, and its place unless axes have to move."""
    (_, summed), (_, batch) = how.contract, how.batch
    free = [d for d in range(w.ndim) if d not in summed and d not in batch]
    summed, lies = [summed[i] for i in order_of_sums(w, how)], list(range(w.ndim))
    if [*batch, *summed, *free] == lies:
        return False, how.place
    transposed = [*batch, *free, *summed] == lies
    return transposed, how.place if transposed else None


def order_of_sums(w: QuantizedArray, how: Product) -> list[int]:
    """In which order to go through the axes that are summed over: that of groups comes last."""
    summed = how.contract[1]
    last = None if w.axis is None else w.ndim + w.axis
    return sorted(range(len(summed)), key=lambda i: (summed[i] == last, summed[i]))
