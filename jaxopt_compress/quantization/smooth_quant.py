"""Quantization of weights and activations, with the range of outlying inputs moved to weights."""

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import InputQuantizedArray, ScaledArray
from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    Parameter,
    compression_of,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.compression.matrices import matrices_of
from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.numerics.steps import symmetric_step
from jaxopt_compress.quantization.activations import Activations, as_activations
from jaxopt_compress.quantization.awq import along_inputs, as_factors, over_window
from jaxopt_compress.quantization.products import asked_of_grid
from jaxopt_compress.quantization.quantize import ELSEWHERE, quantize_method
from jaxopt_compress.quantization.solved import SolvedState, check_stats
from jaxopt_compress.quantization.state import dense, per_stack
from jaxopt_compress.tree import Where


@answers(ELSEWHERE)
def smooth_quant(
    format: str | Format = "int8",
    group_size: int | tuple[int, int] | None = None,
    where: Where = None,
    *,
    activations: Activations | str = "int8",
    alpha: float = 0.5,
    symmetric: bool = True,
    stack: int = 0,
    scale_dtype: str | None = None,
    pad: bool = False,
) -> Compression:
    r"""Rounds weights and activations after evening out the ranges of the inputs.

    A few inputs with large magnitudes cost all others their precision, since activations share a
    scale. Products run with

    .. math:: x W = (x \, \mathrm{diag}(s)^{-1}) (\mathrm{diag}(s) W), \qquad
        s_i = \max |x_i|^\alpha / \max |W_i|^{1 - \alpha}

    of which both factors are rounded. The scales stand beside the weight, so that the function may
    be any one; `fold_scales` and `smooth` put them elsewhere. All places of a convolution's window
    share the scale of their input channel. The codes are final, as those of `gptq`; in training the
    loss is taken at the dense weight, with activations as they are.

    Args:
        format: As in `quantize`.
        group_size: As in `quantize`.
        where: As in `quantize`.
        activations: As in `quantize`, with dynamic or calibrated scales.
        alpha: How much of the range of activations is moved to weights, from 0 to 1.
        symmetric: As in `quantize`.
        stack: As in `quantize`.
        scale_dtype: As in `quantize`.
        pad: As in `quantize`.

    Returns:
        A `Compression` that stores a `ScaledArray` of an `InputQuantizedArray`.

    Raises:
        NeedsStats: In ``init``: a parameter has no ranges of its inputs.
        ValueError: As `quantize`; an ``alpha`` out of range; learned or fixed scales.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> x = jax.random.normal(keys[0], (256, 64)) * jnp.where(jnp.arange(64) < 2, 50.0, 1.0)
        >>> params = {"w": jax.random.normal(keys[1], (64, 16)) * 0.1}
        >>> model = lambda params, x: x @ params["w"]
        >>> stats, uses = jc.calibrate(model, params, [x]), jc.uses(model, params, x)
        >>> error = lambda c: jnp.std(
        ...     model(params, x) - jc.lift(model)(jc.compress(params, c, uses=uses, stats=stats), x)
        ... )
        >>> bool(error(jc.smooth_quant()) < 0.5 * error(jc.quantize("int8", activations="int8")))
        True

    References:
        Xiao et al., 2023, SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
        Language Models.
    """
    fmt, act = format_of(format), as_activations(activations)
    if act is None or act.step not in ("dynamic", "calibrated"):
        raise ValueError(f"activations={activations!r}; their scales are dynamic or calibrated")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}; it lies between 0 and 1")
    weights = quantize_method(fmt, group_size, symmetric, scale_dtype=scale_dtype, pad=pad)

    def check(parameter: Parameter) -> None:
        weights.check(parameter)
        check_stats("smooth_quant", parameter, "ranges")

    def init(parameter: Parameter) -> Decision:
        w, shape = dense(parameter.value), tuple(parameter.value.shape)
        matrices = matrices_of(shape, parameter.layout, parameter.stats)
        reach = along_inputs(parameter.stats.absmax, matrices)
        own = jnp.max(jnp.abs(matrices.of(w.astype(jnp.float32))), -1, initial=0)
        window = parameter.stats.window
        reach, own = (over_window(x, matrices, window, jnp.max) for x in (reach, own))
        # Inputs and weights that are 0 have no range to share.
        scales = jnp.where(
            (reach > 0) & (own > 0), _power(reach, alpha) / _power(own, 1 - alpha), 1
        )
        scales = jnp.clip(scales, 2.0**-60, 2.0**60)
        spread = matrices.per_input(scales)
        scaled = (w.astype(jnp.float32) * spread).astype(w.dtype)
        grid = weights.init(parameter._replace(value=scaled)).state
        step = None
        if act.step == "calibrated":
            top = jnp.max(reach / scales, -1)
            step = symmetric_step(per_stack(top, shape, matrices.parameter.layout.stack), act.fmt)
        stored = grid.compress(scaled, None, parameter.path)
        met = InputQuantizedArray(stored, step, act.format)
        leaf = ScaledArray(met, as_factors(1 / spread, matrices, window))
        return Decision(SolvedState(leaf, fmt, "smooth_quant"))

    asked = asked_of_grid(
        "smooth_quant",
        format,
        group_size,
        where,
        symmetric=symmetric,
        stack=stack,
        scale_dtype=scale_dtype,
        activations=act,
    )
    return compression_of(LeafMethod(check, init), where, stack=stack, asked=asked)


def _power(x: jax.Array, power: float) -> jax.Array:
    return jnp.where(x > 0, x, 1) ** power
