"""Training for the bits that an entropy coder needs: the rate is part of the loss."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.arrays import MaskedArray, QuantizedArray, SparseArray, is_compressed
from jaxopt_compress.arrays.sparse import sparse_rows
from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    Parameter,
    compression_of,
    spelled,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.learned import slopes
from jaxopt_compress.numerics.rates import code_costs, expected_bits
from jaxopt_compress.quantization.quantize import quantize_method
from jaxopt_compress.quantization.state import OnGrid, QuantizedState, dense
from jaxopt_compress.quantization.straight_through import fake_quantize
from jaxopt_compress.tree import Where
from jaxopt_compress.typing import Leaf, PyTree

# How far, in powers of two, a step may move from where it started.
_REACH = 10.0


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["grid", "start"], meta_fields=["stack"]
)
@dataclasses.dataclass(frozen=True)
class RateState(OnGrid):
    """What was decided for one parameter; the logarithms of its steps are learned.

    Attributes:
        grid: The grid; its steps follow from what is learned, by a function that is not the same
            number in every program.
        start: The logarithms at first.
        stack: How many leading axes hold parameters of their own.
    """

    grid: QuantizedState
    start: jax.Array
    stack: int
    kind = "rate_distortion"

    def apply(self, w: Leaf, learned: PyTree) -> jax.Array:
        """``w`` rounded to the grid, differentiable with respect to the steps too."""
        log, step = learned["log2_step"], self.grid.scale
        return _rounded(dense(w), log, step, self.grid.format)

    def compress(self, w: Leaf, learned: PyTree, path: str) -> QuantizedArray:
        """Codes and steps; the codes that are not 0, where that is smaller."""
        stored = self.grid.compress(w, None, path)
        if is_compressed(stored.codes):
            return stored
        codes = stored.unpacked()
        if codes.ndim == self.stack or not codes.size:
            return stored
        kept = sparse_rows(codes, codes != 0, codes.ndim - self.stack)
        sparse = stored.replace(codes=kept, block=None)
        return sparse if sparse.nbytes < stored.nbytes else stored


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _rounded(w: jax.Array, log: jax.Array, step: jax.Array, fmt: Format) -> jax.Array:
    """`fake_quantize`, differentiable with respect to the logarithm of ``step`` too."""
    del log
    return fake_quantize(w, step, None, None, fmt)


@_rounded.defjvp
def _rounded_jvp(fmt: Format, primals: PyTree, tangents: PyTree) -> Any:
    w, log, step = primals
    inside, slope = slopes(w, step, fmt)
    moved = slope * (step * math.log(2) * tangents[1])
    change = jnp.where(inside, tangents[0], 0) + moved.astype(w.dtype)
    return _rounded(w, log, step, fmt), change


_ELSEWHERE = {
    **dict.fromkeys(
        ("rate", "lam", "lmbda", "lagrangian", "weight"),
        "the weight of the bits in the loss is compressed_training(..., penalty=)",
    ),
    **dict.fromkeys(("bits", "nbits", "dtype"), "the format says it, as in 'int8'"),
    **dict.fromkeys(("scale", "step_size", "delta"), "write step="),
}


@answers(_ELSEWHERE)
def rate_distortion(
    format: str | Format = "int8",
    step: float | None = None,
    where: Where = None,
    *,
    per: str = "tensor",
    stack: int = 0,
) -> Compression:
    r"""Rounds parameters to grids that are trained together with them for few bits.

    The ``penalty`` is an estimate of the bits that an entropy coder needs for the codes, smooth in
    parameters and steps. With :math:`u = |w| / s`,

    .. math::
        \sum_i \left( \log_2 \tfrac{1 - p_i}{p_i} + \tfrac32 \right) (1 - e^{-u_i / 0.7})
        + 1.2 \log_2 (1 + u_i) + \log_2 \tfrac{1}{1 - p_i}

    where :math:`p_i` follows from the shares of codes that are not 0 in the parameter, and among
    the other codes of the same input and of the same output; so zeros become cheaper the more of
    them there are, and whole inputs and outputs become 0. ``compressed_training(..., penalty=)`` is
    what one bit costs in units of the loss: 1e-6 is a good start for a cross-entropy, rising from
    0. The logarithms of steps are learned parts. The estimate guides training and is no measure:
    write the file, by ``jc.save(path, tree, coding="context")``.

    Args:
        format: Signed integers, which hold the codes: ``"int8"`` by default.
        step: Where steps start; by default at the power of two below the root mean square of the
            entries that are not 0.
        where: Which parameters; by default the floating ones of rank 2 and more, and where uses are
            given only those with a use.
        per: ``"tensor"``: one step for a parameter, and for each entry of a stack; ``"channel"``:
            one per output.
        stack: As in `quantize`.

    Returns:
        A `Compression` with learned parts and a penalty, that stores `QuantizedArray`, the codes in
        a `SparseArray` where that is smaller.

    Raises:
        ValueError: A format that is not of signed integers, or a step that is not above 0; in
            ``init``: what `quantize` refuses.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> c = jc.rate_distortion(step=0.5)
        >>> params = {"w": jnp.array([[0.1, -0.2, 0.9, 0.0], [0.0, 0.1, -0.2, 0.24]])}
        >>> state = c.init(params)
        >>> print(c.apply(params, state)["w"][0], c.penalty(params, state).round())
        [0. 0. 1. 0.] 16.0

    References:
        Wiedemann et al., 2020, DeepCABAC: A Universal Compression Algorithm for Deep Neural
        Networks. Oktay et al., 2020, Scalable Model Compression by Entropy Penalized
        Reparameterization. Esser et al., 2020, Learned Step Size Quantization.
    """
    fmt = format_of(format)
    if not isinstance(fmt.grid, Integers) or not fmt.grid.signed or fmt.grid.high < 1:
        raise ValueError(f"rate_distortion needs signed integers, not {fmt.name!r}")
    if step is not None and not 2.0**-126 <= step <= 2.0**126:
        raise ValueError(f"step={step}; a step lies between 2^-126 and 2^126")
    base = quantize_method(fmt, per=per)

    def init(parameter: Parameter) -> Decision:
        grid = base.init(parameter).state
        like = jnp.zeros(grid.scale.shape, jnp.float32)
        first = _power_below(parameter, grid) if step is None else like + jnp.float32(step)
        log = jnp.round(jnp.log2(first)) if step is None else like + jnp.float32(math.log2(step))
        grid = dataclasses.replace(grid, scale=first)
        return Decision(RateState(grid, log, len(parameter.layout.stack)), {"log2_step": log})

    def update(decision: Decision, count: jax.Array, parameter: Parameter) -> Decision:
        del count, parameter
        state, log = decision.state, decision.learned["log2_step"]
        log = jnp.where(jnp.isnan(log), state.start, log)
        log = jnp.clip(log, state.start - _REACH, state.start + _REACH)
        grid = dataclasses.replace(state.grid, scale=jnp.exp2(log))
        return Decision(dataclasses.replace(state, grid=grid), {"log2_step": log})

    def penalty(decision: Decision, parameter: Parameter) -> jax.Array:
        step = jnp.exp2(decision.learned["log2_step"])
        ratio = jnp.abs(dense(parameter.value).astype(jnp.float32)) / step
        cost = code_costs(parameter.matrix(lax.stop_gradient(ratio) > 0.5))
        return jnp.sum(expected_bits(parameter.matrix(ratio), cost))

    def check(parameter: Parameter) -> None:
        value = parameter.value
        if is_compressed(value) and not isinstance(value, (SparseArray, MaskedArray)):
            raise TypeError(
                f"{parameter.describe()} is already a {type(value).__name__} and cannot be "
                "rounded; materialize it first"
            )
        base.check(parameter)

    asked = spelled(
        "rate_distortion", fmt.name, step=step, where=where, per=per, stack=stack or None
    )
    method = LeafMethod(check, init, update, penalty)
    return compression_of(method, where, stack=stack, asked=asked)


def _power_below(parameter: Parameter, grid: QuantizedState) -> jax.Array:
    """The power of two below the root mean square of the entries that are not 0; 1 for none."""
    x = jnp.abs(dense(parameter.value).astype(jnp.float32))
    axes = tuple(d for d in range(-x.ndim, 0) if grid.scale.shape[d] == 1)
    top = jnp.max(x, axes, keepdims=True, initial=0)
    top = lax.reduce_precision(jnp.clip(top, 2.0**-100, 2.0**100), exponent_bits=8, mantissa_bits=0)
    total = jnp.sum((x * (1 / top)) ** 2, axes, keepdims=True)
    count = jnp.sum(x > 0, axes, keepdims=True)
    mean = jnp.sqrt(total / jnp.maximum(count, 1))
    step = lax.reduce_precision(mean, exponent_bits=8, mantissa_bits=0) * top
    return jnp.where(total > 0, step, 1.0)
