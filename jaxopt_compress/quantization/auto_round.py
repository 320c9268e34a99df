"""Quantization whose rounding is learned from second moments."""

import functools

from jaxopt_compress.compression import Compression, compression_of
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.numerics.bounds import Bounds
from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.solvers.ada_round import ada_round
from jaxopt_compress.numerics.solvers.sign_round import sign_round
from jaxopt_compress.quantization.activations import Activations
from jaxopt_compress.quantization.products import asked_of_grid, with_products
from jaxopt_compress.quantization.quantize import ELSEWHERE, quantize_method
from jaxopt_compress.quantization.solved import solved, weighing
from jaxopt_compress.tree import Where

_SOLVERS = {"signed": (sign_round, 200), "relaxed": (ada_round, 1000)}


@answers(ELSEWHERE)
def auto_round(
    format: str | Format,
    group_size: int | tuple[int, int] | None = None,
    where: Where = None,
    *,
    symmetric: bool = True,
    stack: int = 0,
    per: str = "channel",
    bounds: Bounds | None = None,
    scale_dtype: str | None = None,
    pad: bool = False,
    activations: Activations | str | None = None,
    method: str = "signed",
    steps: int | None = None,
) -> Compression:
    r"""Rounds each entry up or down, as descent on the error of products says.

    The error is :math:`\mathrm{tr}(D^T H D)` with :math:`D = \hat W - W` and :math:`H = E[x x^T]`,
    for each parameter by itself. It is at most that of rounding to the nearest on the same grid.
    Scales are decided before. The codes are final, as those of `gptq`.

    Args:
        format: As in `quantize`; one of integers.
        group_size: As in `quantize`.
        where: As in `quantize`.
        symmetric: As in `quantize`.
        stack: As in `quantize`.
        per: As in `quantize`.
        bounds: As in `quantize`; by default the range with the least squared error, each counted by
            the mean square of the input that the weight meets.
        scale_dtype: As in `quantize`.
        pad: As in `quantize`.
        activations: As in `quantize`.
        method: ``"signed"``: signed gradient descent (SignRound); or ``"relaxed"``: a soft choice
            between the two levels, driven to a hard one (AdaRound).
        steps: Steps of descent, each of which takes one product with :math:`H`, or two if relaxed;
            by default 200, or 1000.

    Returns:
        A `Compression` that stores `QuantizedArray`.

    Raises:
        NeedsStats: In ``init``: a parameter has no second moments of its inputs.
        ValueError: As `quantize`; a format that is not one of integers; or no steps.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> x = jax.random.normal(keys[0], (512, 8)) @ jax.random.normal(keys[1], (8, 64))
        >>> params = {"w": jax.random.normal(keys[2], (64, 16))}
        >>> model = lambda params, x: x @ params["w"]
        >>> stats, uses = jc.calibrate(model, params, [x]), jc.uses(model, params, x)
        >>> small = jc.compress(params, jc.auto_round("int4"), uses=uses, stats=stats)
        >>> nearest = jc.compress(params, jc.quantize("int4"), uses=uses)
        >>> error = lambda small: jnp.std(jc.lift(model)(small, x) - model(params, x))
        >>> bool(error(small) < 0.7 * error(nearest))
        True

    References:
        Cheng et al., 2024, Optimize Weight Rounding via Signed Gradient Descent for the
        Quantization of LLMs.
        Nagel et al., 2020, Up or Down? Adaptive Rounding for Post-Training Quantization.
    """
    fmt = format_of(format)
    if not isinstance(fmt.grid, Integers):
        raise ValueError(f"auto_round({fmt.name!r}): it rounds to integers, such as 'int4'")
    if method not in _SOLVERS:
        raise ValueError(f"method={method!r}; it is one of {', '.join(_SOLVERS)}")
    solve, usual = _SOLVERS[method]
    steps = usual if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps={steps}; it is at least 1")
    grid = {"per": per, "scale_dtype": scale_dtype, "pad": pad}
    weights = quantize_method(fmt, group_size, symmetric, bounds=bounds, **grid)
    weigh = weighing(fmt, bounds, symmetric, scale_dtype)
    run = functools.partial(solve, fmt=fmt, steps=steps)
    rounds = solved("auto_round", weights, run, weigh)
    asked = asked_of_grid(
        "auto_round",
        format,
        group_size,
        where,
        symmetric=symmetric,
        stack=stack,
        per=per,
        scale_dtype=scale_dtype,
        activations=activations,
    )
    return compression_of(with_products(rounds, activations, None), where, stack=stack, asked=asked)
