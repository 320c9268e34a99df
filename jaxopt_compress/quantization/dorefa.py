"""DoReFa: weights squashed by tanh, and activations between 0 and 1."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import FakeQuantizedArray, SparseArray
from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    Parameter,
    compression_of,
    spelled,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.numerics.codes import decode
from jaxopt_compress.numerics.formats import format_of
from jaxopt_compress.quantization.activations import Activations, Backward
from jaxopt_compress.quantization.activations import activations as fixed
from jaxopt_compress.quantization.products import asked_of_products, with_products
from jaxopt_compress.quantization.quantize import ELSEWHERE, quantize_method
from jaxopt_compress.quantization.state import OnGrid, QuantizedState, dense
from jaxopt_compress.tree import Where
from jaxopt_compress.typing import Leaf, PyTree

FORMATS = ("binary", "odd2", "odd3", "odd4")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["grid", "bounds", "top"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class DorefaState(OnGrid):
    """What was decided for one parameter.

    Attributes:
        grid: Odd multiples of a constant step.
        bounds: ``[*steps, levels - 1]``: between which values of a weight its level changes. What
            tanh and its maximum decide is decided here: tanh is not the same number in every
            program.
        top: The largest magnitude of ``tanh(w)``, of the shape of the steps.
    """

    grid: QuantizedState
    bounds: jax.Array
    top: jax.Array
    kind = "quantize"

    def fake_quantized(self, w: Leaf, learned: PyTree) -> FakeQuantizedArray:
        """As `apply`, with the grid of the values."""
        return self.grid.gridded(self.apply(w, learned))

    def apply(self, w: Leaf, learned: PyTree) -> jax.Array:
        """The view on the grid."""
        del learned
        return _squashed(dense(w), self.bounds, self.top, self.grid.scale)

    def compress(self, w: Leaf, learned: PyTree, path: str) -> Any:
        """Codes of the view, whose values are on the grid."""
        if isinstance(w, SparseArray):
            raise ValueError(
                f"{path!r} is pruned, and DoReFa's grid has no zero: take quantize or lsq"
            )
        return self.grid.compress(self.apply(w, learned), None, path)


@jax.custom_jvp
def _squashed(w: jax.Array, bounds: jax.Array, top: jax.Array, scale: jax.Array) -> jax.Array:
    wide = w.astype(jnp.float32)
    steps = bounds.shape[-1]
    level = jnp.full(w.shape, -float(steps), jnp.float32)
    for i in range(steps):
        level = level + 2 * (wide >= bounds[..., i]).astype(jnp.float32)
    del top
    return decode(level, scale, w.dtype)


@_squashed.defjvp
def _squashed_jvp(primals, tangents):
    w, _, top, _ = primals
    squashed = jnp.tanh(w.astype(jnp.float32))
    slope = jnp.where(jnp.abs(squashed) <= top, (1 - squashed**2) / top, 0)
    return _squashed(*primals), (slope * tangents[0]).astype(w.dtype)


@answers(ELSEWHERE)
def dorefa(
    format: str,
    where: Where = None,
    *,
    stack: int = 0,
    per: str = "tensor",
    activations: Activations | str | None = None,
    backward: Backward | str | None = None,
) -> Compression:
    r"""Squashes parameters to [-1, 1] and rounds them to evenly spaced levels.

    .. math:: \hat w = 2 \, q_b\!\left(\frac{\tanh w}{2 \max |\tanh w|} + \frac12\right) - 1,
        \qquad q_b(r) = \frac{\mathrm{round}((2^b - 1) \, r)}{2^b - 1}

    The levels are the odd multiples of :math:`1 / (2^b - 1)`; 0 is none of them, so pruned entries
    would not stay 0. The view has another size than the parameter: models have to be trained with
    it. Gradients pass through rounding, and the maximum is a constant for them, refreshed by each
    update. One bit: :math:`\mathrm{sign}(w) \, \mathrm{mean} |w|`, as ``quantize("binary")``.

    Args:
        format: ``"binary"``, ``"odd2"``, ``"odd3"`` or ``"odd4"``: 1 to 4 bits.
        where: As in `quantize`.
        stack: As in `quantize`.
        per: ``"tensor"``: one maximum, or mean, for all of a parameter, and for each entry of a
            stack; or ``"channel"``.
        activations: As in `quantize`; a format's name alone, such as ``"uint4"``, clips them to
            [0, 1] as the paper does.
        backward: As in `quantize`.

    Returns:
        A `Compression` that stores `QuantizedArray`; with ``activations`` in an
        `InputQuantizedArray`.

    Raises:
        ValueError: Other formats; in ``compress``: pruned parameters.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jnp.array([[0.1, 3.0], [-0.7, -0.2]])}
        >>> jc.compress(params, jc.dorefa("odd2"))["w"].materialize().round(3)
        Array([[ 0.333,  1.   ],
               [-0.333, -0.333]], dtype=float32)

    References:
        Zhou et al., 2016, DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low
        Bitwidth Gradients.
    """
    if format not in FORMATS:
        raise ValueError(f"dorefa({format!r}); there are {', '.join(FORMATS)}")
    base = quantize_method(format, per=per)
    rounded = activations
    if isinstance(activations, str):
        if format_of(activations).grid.low < 0:
            raise ValueError(
                f"activations={activations!r}; they lie in [0, 1]: take an unsigned format"
            )
        rounded = fixed(activations, "fixed", high=1.0)

    def init(parameter: Parameter) -> Decision:
        decision = base.init(parameter)
        return decision if format == "binary" else decided(decision, parameter)

    def update(decision: Decision, count: jax.Array, parameter: Parameter) -> Decision:
        if format == "binary" and base.update is not None:
            return base.update(decision, count, parameter)
        return decided(decision, parameter)

    def decided(decision: Decision, parameter: Parameter) -> Decision:
        return Decision(_decided(decision.state.grid, dense(parameter.value)))

    method = LeafMethod(base.check, init, update)
    asked = spelled(
        "dorefa",
        format,
        where=where,
        stack=stack or None,
        per=per,
        **asked_of_products(rounded, backward),
    )
    return compression_of(with_products(method, rounded, backward), where, stack=stack, asked=asked)


def _decided(grid: QuantizedState, w: jax.Array) -> DorefaState:
    last = int(grid.format.grid.high)
    high = jnp.max(jnp.abs(w.astype(jnp.float32)), grid.reduce, keepdims=True, initial=0)
    top = jnp.tanh(high)
    top = jnp.where(top >= 2.0**-125, top, 1.0)
    middles = np.arange(1 - last, last, 2, dtype=np.float32) / np.float32(last)
    bounds = jnp.arctanh(top[..., None] * np.expand_dims(middles, tuple(range(top.ndim))))
    scale = jnp.full(top.shape, 1 / last, jnp.float32)
    return DorefaState(dataclasses.replace(grid, scale=scale), bounds, top)
