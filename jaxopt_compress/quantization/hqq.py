"""Quantization without data, on the grid that a norm below 1 asks for."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    Parameter,
    compression_of,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.numerics.groups import grouped
from jaxopt_compress.numerics.solvers.half_quadratic import half_quadratic
from jaxopt_compress.numerics.steps import shorter_steps
from jaxopt_compress.quantization.activations import Activations
from jaxopt_compress.quantization.products import asked_of_grid, with_products
from jaxopt_compress.quantization.quantize import ELSEWHERE, quantize_method
from jaxopt_compress.quantization.state import QuantizedState, dense
from jaxopt_compress.tree import Where


@answers(ELSEWHERE)
def hqq(
    format: str | Format,
    group_size: int | tuple[int, int] | None = None,
    where: Where = None,
    *,
    symmetric: bool = True,
    stack: int = 0,
    per: str = "channel",
    scale_dtype: str | None = None,
    pad: bool = False,
    activations: Activations | str | None = None,
    power: float = 0.7,
    iterations: int = 20,
) -> Compression:
    r"""Rounds to the nearest on grids with a small error in an :math:`l_p` norm; needs no data.

    The norm, with :math:`p < 1`, lets a few outliers be far off for the sake of the others. The
    paper fits zero points that are not integers and leaves scales alone; here 0.0 stays exact, so
    zero points are integers, if ``symmetric=False``, and scales are fitted too. In training the
    grid is fitted anew by each update, and gradients are straight-through, 0 where it clips.

    Args:
        format: As in `quantize`; with scales in float32, bfloat16 or float16.
        group_size: As in `quantize`.
        where: As in `quantize`.
        symmetric: As in `quantize`.
        stack: As in `quantize`.
        per: As in `quantize`.
        scale_dtype: As in `quantize`.
        pad: As in `quantize`.
        activations: As in `quantize`.
        power: The :math:`p` of the norm, above 0 and at most 1.
        iterations: How often the grid is fitted.

    Returns:
        A `Compression` that stores `QuantizedArray`.

    Raises:
        ValueError: As `quantize`; or scales in 8-bit floats.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jax.random.t(jax.random.key(0), 3, (64, 16))}
        >>> error = lambda c: jnp.mean(
        ...     jnp.abs(jc.compress(params, c)["w"].materialize() - params["w"]) ** 0.7
        ... )
        >>> bool(error(jc.hqq("int3")) < error(jc.quantize("int3")))
        True

    References:
        Badri and Shaji, 2023, Half-Quadratic Quantization of Large Machine Learning Models.
    """
    fmt = format_of(format)
    scales = scale_dtype or fmt.scale
    if scales.startswith("float8"):
        raise ValueError(
            f"hqq({fmt.name!r}) with scales in {scales}: it fits scales in float32, bfloat16 or "
            "float16"
        )
    if not 0 < power <= 1 or iterations < 1:
        raise ValueError(f"power={power}, iterations={iterations}; 0 < power <= 1, iterations >= 1")
    options = {"per": per, "scale_dtype": scale_dtype, "pad": pad}
    weights = quantize_method(fmt, group_size, symmetric, **options)

    def init(parameter: Parameter) -> Decision:
        return fitted(weights.init(parameter).state, parameter)

    def update(decision: Decision, count: jax.Array, parameter: Parameter) -> Decision:
        assert weights.update is not None
        return fitted(weights.update(decision, count, parameter).state, parameter)

    def fitted(state: QuantizedState, parameter: Parameter) -> Decision:
        w = dense(parameter.value).astype(jnp.float32)
        x, axes, inner = grouped(w, state.reduce, state.cuts)
        wide = lambda x: None if x is None else jnp.expand_dims(x, inner)
        own = state.scale.astype(jnp.float32)
        scale, zero = half_quadratic(x, wide(own), wide(state.zero), axes, fmt, power, iterations)
        scale = jnp.squeeze(scale, inner)
        scale = scale if scales == "float32" else shorter_steps(scale, scales)
        zero = None if zero is None else jnp.squeeze(zero, inner)
        return Decision(dataclasses.replace(state, scale=scale, zero=zero, clips=True))

    asked = asked_of_grid(
        "hqq",
        format,
        group_size,
        where,
        symmetric=symmetric,
        stack=stack,
        per=per,
        scale_dtype=scale_dtype,
        activations=activations,
    )
    method = LeafMethod(weights.check, init, update)
    return compression_of(with_products(method, activations, None), where, stack=stack, asked=asked)
