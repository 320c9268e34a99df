"""Learned Step Size Quantization: steps that gradients train along with the weights."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.compression import Compression, LeafState
from jaxopt_compress.compression.base import CompressionState, map_states
from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.numerics.groups import by_groups, spread_to
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.learned import least_step, scaled_gradient, slopes, within_reach
from jaxopt_compress.quantization.checks import check_gradients
from jaxopt_compress.quantization.inputs import with_inputs
from jaxopt_compress.quantization.quantize import quantize
from jaxopt_compress.quantization.state import QuantizedState, dense
from jaxopt_compress.quantization.straight_through import fake_quantize
from jaxopt_compress.tree import Where
from jaxopt_compress.tree.meshes import reduced_on_auto_axes


@functools.partial(jax.tree_util.register_dataclass, data_fields=["grid", "least"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class LsqState(LeafState):
    """What was decided for one parameter; its steps are ``learned["step"]``.

    Attributes:
        grid: The layout of the grid, without steps.
        least: How small steps may become.
    """

    grid: QuantizedState
    least: jax.Array
    kind = "quantize"

    @property
    def keeps_zeros(self) -> bool:
        """Whether the grid has a level at 0."""
        return self.grid.keeps_zeros

    @property
    def format(self) -> Format:
        """The number format."""
        return self.grid.format

    def current(self, learned: Any) -> QuantizedState:
        """The grid with its present steps."""
        return dataclasses.replace(self.grid, scale=learned["step"])

    def apply(self, w: Any, learned: Any) -> jax.Array:
        """``w`` rounded to the grid, differentiable with respect to the steps too."""
        w, step, fmt = dense(w), learned["step"], self.grid.format
        each = max(1, w.size // max(1, step.size))
        step = scaled_gradient(step, 1 / math.sqrt(each * fmt.grid.high))
        return learned_quantize(w, spread_to(step, self.grid.cuts, w.shape), fmt)

    def compress(self, w: Any, learned: Any, path: str) -> Any:
        """Codes and the present steps."""
        return self.current(learned).compress(w, None, path)

    def settle(self, learned: Any) -> Any:
        """The learned part with steps that are positive and finite."""
        return {"step": within_reach(learned["step"], self.least)}


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


def lsq(
    format: str | Format,
    group: int | tuple[int, int] | None = None,
    where: Where = None,
    *,
    per: str = "channel",
    pad: bool = False,
    inputs: str | None = None,
    offset: bool = False,
    gradients: str | None = None,
) -> Compression:
    r"""Rounds parameters to integers by steps that gradients train.

    .. math:: \hat w = \mathrm{round}(\mathrm{clip}(w / s, q_{min}, q_{max})) \, s

    Steps start at :math:`2 \, \mathrm{mean} |w| / \sqrt{q_{max}}`, over the entries that are not 0
    (a step for zeros only: at 1), and their gradients are multiplied by
    :math:`1 / \sqrt{n \, q_{max}}`, with :math:`n` entries per step. They are learned parts: the
    optimizer ``compressed_training(..., learned=)`` trains them. Each update of the compression
    brings them back to within a factor of 1024 of where they started, and replaces NaN by the
    start, so they stay positive and finite.

    Activations: the same with one step for all that meets a parameter, where :math:`n` counts the
    entries that one output sums. Where they are never negative, :math:`|x|` is averaged; otherwise
    its mean is taken from the second moments as of a normal distribution, or, where ``stats`` have
    none, the step starts at the range seen. With ``offset``,

    .. math:: \hat x = \mathrm{round}(\mathrm{clip}((x - \beta) / s, q_{min}, q_{max})) \, s + \beta

    starts with the range seen, and :math:`\beta` is learned too, with gradients scaled likewise. In
    a product it adds :math:`\beta` times the sum of the weights; padding of convolutions stays 0.

    Args:
        format: Integers ``"int2"`` to ``"int8"``, ``"int16"``, ``"ternary"``; unsigned ones for
            parameters without negative entries.
        group: As in `quantize`.
        where: As in `quantize`.
        per: ``"channel"``, or ``"tensor"``: one step for all of a parameter, and for each entry of
            a stack.
        pad: As in `quantize`.
        inputs: The integer format of the activations that meet a parameter, such as ``"int4"``, or
            ``"uint4"`` where they are not negative; `lift` rounds them, and ``init`` needs
            ``stats``. By default they are left as they are.
        offset: Whether activations have a learned offset (LSQ+).
        gradients: As in `quantize`.

    Returns:
        A `Compression` that stores `QuantizedArray`; with ``inputs`` in an `InputQuantizedArray`.

    Raises:
        ValueError: Formats that are not of integers or have no positive code; in ``init``: what
            `quantize` refuses, no ``stats`` for ``inputs``, or negative activations for an unsigned
            format without ``offset``.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> c = jc.lsq("int2", per="tensor")
        >>> state = c.init({"w": jnp.array([[0.5, 3.0], [0.25, -2.25]])})
        >>> state.learned["w"]["step"]
        Array([[3.]], dtype=float32)

    References:
        Esser et al., 2020, Learned Step Size Quantization. Bhalgat et al., 2020, LSQ+: Improving
        Low-Bit Quantization Through Learnable Offsets and Better Initialization.
    """
    fmt = format_of(format)
    if not isinstance(fmt.grid, Integers) or fmt.grid.high < 1:
        raise ValueError(f"lsq needs integers with a positive code, not {fmt.name!r}")
    if per not in ("channel", "tensor") or (per == "tensor" and group is not None):
        raise ValueError(f"per={per!r}; there are 'channel', and without groups 'tensor'")
    if offset and inputs is None:
        raise ValueError("offset=True is an offset of activations: it goes with inputs=")
    check_gradients(gradients, inputs)
    base = quantize(fmt, group, where=where, pad=pad)

    def init(params: Any, *, uses: Any = None, stats: Any = None) -> CompressionState:
        inner = base.init(params, uses=uses, stats=stats)
        leaves: dict[str, LsqState] = {}
        learned: dict[str, Any] = {}

        def start(path: str, w: Any, grid: QuantizedState) -> Any:
            grid = per_tensor(grid, len(w.shape)) if per == "tensor" else grid
            step = first_step(grid, dense(w))
            leaves[path] = LsqState(dataclasses.replace(grid, scale=None), least_step(step))
            learned[path] = {"step": step}
            return w

        map_states(start, params, inner)
        return CompressionState(inner.count, learned, leaves)

    def update(state: CompressionState, params: Any) -> CompressionState:
        del params
        settled = {k: state.leaves[k].settle(x) for k, x in state.learned.items()}
        return CompressionState(state.count + 1, settled, state.leaves)

    made = Compression(init, update, base.apply, base.compress)
    if inputs is None:
        return made
    return with_inputs(made, inputs, "lsq+" if offset else "lsq", gradients)


def per_tensor(grid: QuantizedState, ndim: int) -> QuantizedState:
    """The grid with one step for all of a parameter, and for each entry of a stack."""
    axes = tuple(d for d in range(-ndim, 0) if d not in grid.stack)
    return dataclasses.replace(grid, reduce=axes)


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
