"""Quantization with larger weights for the inputs that matter more."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.arrays import ScaledArray
from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    NeedsStats,
    Parameter,
    compression_of,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.compression.matrices import Matrices, matrices_of
from jaxopt_compress.numerics.bounds import absmax
from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.numerics.output_error import output_energy
from jaxopt_compress.quantization.products import asked_of_grid
from jaxopt_compress.quantization.quantize import ELSEWHERE, quantize_method
from jaxopt_compress.quantization.rule import Rule, measured, rule_of
from jaxopt_compress.quantization.solved import SolvedState, check_stats, weighted
from jaxopt_compress.quantization.state import QuantizedState, dense
from jaxopt_compress.tree import Where


@answers(ELSEWHERE)
def awq(
    format: str | Format,
    group_size: int | tuple[int, int] | None = None,
    where: Where = None,
    *,
    symmetric: bool = True,
    stack: int = 0,
    scale_dtype: str | None = None,
    pad: bool = False,
    candidates: int = 20,
    alpha: float | None = None,
) -> Compression:
    r"""Rounds weights to the nearest after scaling them by how large their inputs are.

    .. math:: \hat W = \mathrm{diag}(s)^{-1} Q(\mathrm{diag}(s) W), \qquad
        s_i = (E |x_i|)^\alpha

    with the :math:`\alpha` in [0, 1) that leaves the least error of products
    :math:`\mathrm{tr}(D^T H D)`, for each entry of a stack, and then the range with the least
    squared error, each counted by the mean square of its scaled input. Products multiply the
    activation by :math:`1 / s`; nothing else of the function changes, so that it may be any one;
    `fold_scales` takes them away. All places of a convolution's window share the scale of their
    input channel. The codes are final, as those of `gptq`.

    Args:
        format: As in `quantize`.
        group_size: As in `quantize`.
        where: As in `quantize`.
        symmetric: As in `quantize`.
        stack: As in `quantize`.
        scale_dtype: As in `quantize`.
        pad: As in `quantize`.
        candidates: How many :math:`\alpha` are tried, evenly spaced.
        alpha: The only one that is tried, in [0, 1]. Weights that meet the same inputs then have
            the same scales, which `fold_scales` needs.

    Returns:
        A `Compression` that stores a `ScaledArray` of a `QuantizedArray`.

    Raises:
        NeedsStats: In ``init``: a parameter has no second moments and means of its inputs.
        ValueError: As `quantize`; binary and ternary; or no candidates.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> x = jax.random.normal(keys[0], (256, 64)) * jnp.where(jnp.arange(64) < 4, 10.0, 1.0)
        >>> params = {"w": jax.random.normal(keys[1], (64, 16))}
        >>> model = lambda params, x: x @ params["w"]
        >>> stats, uses = jc.calibrate(model, params, [x]), jc.uses(model, params, x)
        >>> error = lambda c: jnp.std(
        ...     model(params, x) - jc.lift(model)(jc.compress(params, c, uses=uses, stats=stats), x)
        ... )
        >>> bool(error(jc.awq("int4")) < 0.8 * error(jc.quantize("int4")))
        True

    References:
        Lin et al., 2024, AWQ: Activation-aware Weight Quantization for On-Device LLM Compression
        and Acceleration.
    """
    fmt = format_of(format)
    if fmt.absmean:
        raise ValueError(f"awq({fmt.name!r}): the scale is the mean magnitude, which none can lead")
    if candidates < 1:
        raise ValueError(f"candidates={candidates}; it is at least 1")
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}; it lies between 0 and 1")
    tried = tuple(i / candidates for i in range(candidates)) if alpha is None else (alpha,)
    weights = quantize_method(fmt, group_size, symmetric, scale_dtype=scale_dtype, pad=pad)
    rule = rule_of(fmt, (None, None), absmax(), symmetric, scale_dtype)

    def check(parameter: Parameter) -> None:
        weights.check(parameter)
        check_stats("awq", parameter, "moments", "means")
        if "mean_magnitude" not in parameter.stats.values["means"]:
            raise NeedsStats(
                f"awq needs the mean magnitudes of what meets {parameter.describe()}, a factor of "
                "another parameter: they do not follow from statistics of the whole; use "
                "jaxopt_compress.gptq for factors"
            )

    def init(parameter: Parameter) -> Decision:
        state: QuantizedState = weights.init(parameter).state
        w, stats = dense(parameter.value), parameter.stats
        matrices = matrices_of(tuple(w.shape), parameter.layout, stats)
        magnitude = along_inputs(stats.mean_magnitude, matrices)
        magnitude = over_window(magnitude, matrices, stats.window, jnp.mean)
        given = matrices.moment(stats), magnitude
        scales, squares = _best_scales(state, w, *given, matrices, rule, tried)
        scaled = w.astype(jnp.float32) * scales
        state = weighted(state, scaled, squares, rule)
        stored = state.compress(scaled.astype(w.dtype), None, parameter.path)
        factors = as_factors(1 / scales, matrices, stats.window)
        return Decision(SolvedState(ScaledArray(stored, factors), fmt, "awq"))

    asked = asked_of_grid(
        "awq",
        format,
        group_size,
        where,
        symmetric=symmetric,
        stack=stack,
        scale_dtype=scale_dtype,
    )
    return compression_of(LeafMethod(check, init), where, stack=stack, asked=asked)


@functools.partial(jax.jit, static_argnames=("matrices", "rule", "tried"))
def _best_scales(
    state: QuantizedState,
    w: jax.Array,
    moment: jax.Array,
    magnitude: jax.Array,
    matrices: Matrices,
    rule: Rule,
    tried: tuple[float, ...],
) -> tuple[jax.Array, jax.Array]:
    """The scales of inputs, and the mean squares of the scaled inputs, of the parameter's shape."""
    w = w.astype(jnp.float32)

    def spread(alpha: jax.Array) -> jax.Array:
        return matrices.per_input(scales_of(magnitude, alpha[..., None]))

    def error(alpha: jax.Array) -> jax.Array:
        scales = spread(jnp.broadcast_to(alpha, moment.shape[:-2]))
        view = measured(state, w * scales, rule).apply(w * scales, None)
        return output_energy(matrices.of(view / scales - w), moment)

    alphas = jnp.asarray(tried, jnp.float32)
    errors = lax.map(error, alphas)
    scales = spread(alphas[jnp.argmin(errors, 0)])
    squares = matrices.per_input(jnp.diagonal(moment, axis1=-2, axis2=-1))
    return scales, squares / jnp.square(scales)


def scales_of(magnitude: jax.Array, alpha: jax.Array) -> jax.Array:
    """``magnitude ** alpha`` of inputs, ``[*lead, k]``, about 1; exactly 1 where it is 0."""
    size = jnp.where(magnitude > 0, magnitude, 1)
    low, high = jnp.min(size, -1, keepdims=True), jnp.max(size, -1, keepdims=True)
    # Square roots apart: the product of large ones overflows.
    scales = (size / (jnp.sqrt(low) * jnp.sqrt(high))) ** alpha
    return jnp.where(magnitude > 0, scales, 1)


def along_inputs(x: jax.Array, matrices: Matrices) -> jax.Array:
    """Values ``[k]`` or ``[*lead, k]`` of inputs, for each matrix."""
    lead = jax.eval_shape(matrices.of, matrices.parameter.value).shape[:-2]
    return jnp.broadcast_to(x, (*lead, x.shape[-1]))


def over_window(
    x: jax.Array,
    matrices: Matrices,
    window: tuple[int, ...],
    reduce: Callable[..., jax.Array],
) -> jax.Array:
    """Values ``[*lead, k]`` of inputs, the same for all places of a convolution's window."""
    if not window:
        return x
    spread = matrices.per_input(x)
    same = jnp.broadcast_to(reduce(spread, window, keepdims=True), spread.shape)
    return matrices.of(same)[..., 0]


def as_factors(spread: jax.Array, matrices: Matrices, window: tuple[int, ...] = ()) -> jax.Array:
    """Values of inputs without the axes that they were spread along; one per group of outputs."""
    parts = matrices.groups or 1
    for axis in matrices.parameter.layout.output:
        size = spread.shape[axis]
        stride = size // parts if matrices.groups else max(size, 1)
        spread = lax.slice_in_dim(spread, 0, size, max(stride, 1), axis=axis)
    for axis in window:
        spread = lax.slice_in_dim(spread, 0, min(1, spread.shape[axis]), axis=axis)
    return spread
