"""Learned Step Size Quantization: steps that gradients train along with the weights."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.arrays import FakeQuantizedArray
from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    Parameter,
    compression_of,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.numerics.groups import by_groups, spread_to
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.learned import least_step, scaled_gradient, slopes, within_reach
from jaxopt_compress.quantization.activations import Activations, Backward
from jaxopt_compress.quantization.products import asked_of_grid, with_products
from jaxopt_compress.quantization.quantize import ELSEWHERE, quantize_method
from jaxopt_compress.quantization.state import OnGrid, QuantizedState, dense
from jaxopt_compress.quantization.straight_through import fake_quantize
from jaxopt_compress.tree import Where
from jaxopt_compress.tree.meshes import reduced_on_auto_axes
from jaxopt_compress.typing import Leaf, PyTree


@functools.partial(jax.tree_util.register_dataclass, data_fields=["grid", "least"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class LsqState(OnGrid):
    """What was decided for one parameter; its scales are ``learned["scale"]``.

    Attributes:
        grid: The layout of the grid, without steps.
        least: How small steps may become.
    """

    grid: QuantizedState
    least: jax.Array
    kind = "quantize"

    def current(self, learned: PyTree) -> QuantizedState:
        """The grid with its present steps."""
        return dataclasses.replace(self.grid, scale=learned["scale"])

    def fake_quantized(self, w: Leaf, learned: PyTree) -> FakeQuantizedArray:
        """As `apply`, with the grid of the values."""
        return self.current(learned).gridded(self.apply(w, learned))

    def apply(self, w: Leaf, learned: PyTree) -> jax.Array:
        """``w`` rounded to the grid, differentiable with respect to the steps too."""
        w, step, fmt = dense(w), learned["scale"], self.grid.format
        each = max(1, w.size // max(1, step.size))
        step = scaled_gradient(step, 1 / math.sqrt(each * fmt.grid.high))
        return learned_quantize(w, spread_to(step, self.grid.cuts, w.shape), fmt)

    def compress(self, w: Leaf, learned: PyTree, path: str) -> Any:
        """Codes and the present steps."""
        return self.current(learned).compress(w, None, path)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def learned_quantize(w: jax.Array, step: jax.Array, fmt: Format) -> jax.Array:
    """`fake_quantize`, differentiable with respect to ``step`` as `slopes` says."""
    return fake_quantize(w, step, None, None, fmt)


@learned_quantize.defjvp
def _learned_quantize_jvp(fmt, primals, tangents):
    (w, step), (w_dot, step_dot) = primals, tangents
    inside, slope = slopes(w, step, fmt)
    change = jnp.where(inside, w_dot, 0) + (slope * step_dot).astype(w.dtype)
    return learned_quantize(w, step, fmt), change


@answers(ELSEWHERE)
def lsq(
    format: str | Format,
    group_size: int | tuple[int, int] | None = None,
    where: Where = None,
    *,
    stack: int = 0,
    per: str = "channel",
    pad: bool = False,
    activations: Activations | str | None = None,
    backward: Backward | str | None = None,
) -> Compression:
    r"""Rounds parameters to integers by steps that gradients train.

    .. math:: \hat w = \mathrm{round}(\mathrm{clip}(w / s, q_{min}, q_{max})) \, s

    Steps start at :math:`2 \, \mathrm{mean} |w| / \sqrt{q_{max}}`, over the entries that are not 0
    (a step for zeros alone: at 1), and their gradients are multiplied by
    :math:`1 / \sqrt{n \, q_{max}}`, with :math:`n` entries per step. They are learned parts: the
    optimizer ``compressed_training(..., learned=)`` trains them. Each update of the compression
    brings them back to within a factor of 1024 of where they started, and replaces NaN by the
    start, so they stay positive and finite.

    Activations are learned likewise by ``activations=jc.activations("int8", step="learned")``.

    Args:
        format: Integers ``"int2"`` to ``"int8"``, ``"int16"``, ``"ternary"``; unsigned ones for
            parameters without negative entries.
        group_size: As in `quantize`.
        where: As in `quantize`.
        stack: As in `quantize`.
        per: As in `quantize`.
        pad: As in `quantize`.
        activations: As in `quantize`.
        backward: As in `quantize`.

    Returns:
        A `Compression` that stores `QuantizedArray`; with ``activations`` in an
        `InputQuantizedArray`.

    Raises:
        ValueError: Formats that are not of integers or have no positive code; in ``init``: what
            `quantize` refuses.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> c = jc.lsq("int2", per="tensor")
        >>> state = c.init({"w": jnp.array([[0.5, 3.0], [0.25, -2.25]])})
        >>> state.learned["w"]["scale"]
        Array([[3.]], dtype=float32)

    References:
        Esser et al., 2020, Learned Step Size Quantization. Bhalgat et al., 2020, LSQ+: Improving
        Low-Bit Quantization Through Learnable Offsets and Better Initialization.
    """
    fmt = format_of(format)
    if not isinstance(fmt.grid, Integers) or fmt.grid.high < 1:
        raise ValueError(f"lsq needs integers with a positive code, not {fmt.name!r}")
    base = quantize_method(fmt, group_size, per=per, pad=pad)

    def init(parameter: Parameter) -> Decision:
        grid = base.init(parameter).state
        step = first_step(grid, dense(parameter.value))
        state = LsqState(dataclasses.replace(grid, scale=None), least_step(step))
        return Decision(state, {"scale": step})

    def update(decision: Decision, count: jax.Array, parameter: Parameter) -> Decision:
        del count, parameter
        state, learned = decision
        return Decision(state, {"scale": within_reach(learned["scale"], state.least)})

    method = LeafMethod(base.check, init, update)
    asked = asked_of_grid(
        "lsq",
        format,
        group_size,
        where,
        stack=stack,
        per=per,
        activations=activations,
        backward=backward,
    )
    return compression_of(
        with_products(method, activations, backward), where, stack=stack, asked=asked
    )


def first_step(grid: QuantizedState, w: jax.Array) -> jax.Array:
    """Where steps start: ``2 mean|w| / sqrt(qmax)``."""

    def mean(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array]:
        size = jnp.abs(x)
        # Relative to the largest one: a sum of large values would overflow. A power of two, which
        # rounds nothing, whatever the product is fused with.
        top = jnp.clip(jnp.max(size, axes, keepdims=True, initial=0), 2.0**-125, 2.0**125)
        top = lax.reduce_precision(top, exponent_bits=8, mantissa_bits=0)
        total = jnp.sum(size * (1 / top), axes, keepdims=True)
        count = jnp.sum(size > 0, axes, keepdims=True, dtype=x.dtype)
        return (top * (total / jnp.maximum(count, 1)),)

    means = lambda x: by_groups(mean, x, grid.reduce, grid.cuts)
    (size,) = reduced_on_auto_axes(means, w.astype(jnp.float32))
    # Unknown to the compiler, which would divide by a constant through its reciprocal.
    half_root = math.sqrt(grid.format.grid.high) / 2
    step = size / lax.optimization_barrier(jnp.full(size.shape, half_root, jnp.float32))
    return jnp.where(step >= 2.0**-125, jnp.minimum(step, 2.0**125), 1.0)
