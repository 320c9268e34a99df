"""Quantization in which later weights make up for the rounding of earlier ones."""

import functools

from jaxopt_compress.compression import Compression, compression_of
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.numerics.bounds import Bounds, mse
from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.numerics.solvers.gptq import gptq as solve
from jaxopt_compress.quantization.activations import Activations
from jaxopt_compress.quantization.products import asked_of_grid, with_products
from jaxopt_compress.quantization.quantize import ELSEWHERE, quantize_method
from jaxopt_compress.quantization.solved import solved
from jaxopt_compress.tree import Where


@answers(ELSEWHERE)
def gptq(
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
    damping: float = 0.01,
    act_order: bool = True,
) -> Compression:
    r"""Rounds parameters so that their products, not their entries, change little.

    For each parameter it minimizes, row after row of the axes that are summed over,

    .. math:: \mathrm{tr}(D^T H D), \qquad D = \hat W - W, \quad H = E[x x^T]

    where the rows that are not rounded yet make up for the errors of those that are. Entries that
    `prune` set to 0 earlier in a chain stay 0, with :math:`W` the parameter before it: the others
    make up for them. Inputs that were always 0 in the statistics have their weights rounded to the
    nearest. Steps are decided before the first row, for all groups. The codes are final: no update
    changes them, and gradients with respect to the parameter are 0. Training goes on with the other
    parameters.

    Args:
        format: As in `quantize`.
        group_size: As in `quantize`.
        where: As in `quantize`.
        symmetric: As in `quantize`.
        stack: As in `quantize`.
        per: As in `quantize`.
        bounds: As in `quantize`; by default ``bounds.mse()``, except for binary and ternary.
        scale_dtype: As in `quantize`.
        pad: As in `quantize`.
        activations: As in `quantize`.
        damping: The share of its mean diagonal that is added to the diagonal of :math:`H`, more
            where float32 cannot factorize it. More of it trusts the statistics less.
        act_order: Whether rows of larger inputs are rounded first; else they are in memory's order.

    Returns:
        A `Compression` that stores `QuantizedArray`.

    Raises:
        NeedsStats: In ``init``: a parameter has no second moments of its inputs.
        ValueError: As `quantize`; or ``damping`` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> x = jax.random.normal(keys[0], (512, 8)) @ jax.random.normal(keys[1], (8, 64))
        >>> params = {"w": jax.random.normal(keys[2], (64, 16))}
        >>> model = lambda params, x: x @ params["w"]
        >>> stats = jc.calibrate(model, params, [x])
        >>> error = lambda c: jnp.std(
        ...     x @ params["w"]
        ...     - jc.lift(model)(
        ...         jc.compress(params, c, uses=jc.uses(model, params, x), stats=stats), x
        ...     )
        ... )
        >>> bool(error(jc.gptq("int4")) < 0.5 * error(jc.quantize("int4")))
        True

    References:
        Frantar et al., 2023, GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
        Transformers.
    """
    if not damping > 0:
        raise ValueError(f"damping={damping}; it is above 0, such as 0.01")
    fmt = format_of(format)
    grid = {"per": per, "scale_dtype": scale_dtype, "pad": pad}
    if bounds is None and not fmt.absmean:
        bounds = mse()
    weights = quantize_method(fmt, group_size, symmetric, bounds=bounds, **grid)
    run = functools.partial(solve, fmt=fmt, damping=damping, act_order=act_order)
    asked = asked_of_grid(
        "gptq",
        format,
        group_size,
        where,
        symmetric=symmetric,
        stack=stack,
        per=per,
        scale_dtype=scale_dtype,
        activations=activations,
    )
    method = with_products(solved("gptq", weights, run), activations, None)
    return compression_of(method, where, stack=stack, asked=asked)
