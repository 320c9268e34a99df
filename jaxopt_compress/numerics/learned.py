"""Derivatives with respect to a step that gradients train, and what keeps such a step usable."""

import functools

import jax
import jax.numpy as jnp

from jaxopt_compress.numerics.codes import between_ends
from jaxopt_compress.numerics.formats import Format
from jaxopt_compress.numerics.integers import Integers

# How far, as a factor, a step may move from where it started; a power of two.
REACH = 2.0**10


def slopes(
    x: jax.Array, step: jax.Array, fmt: Format, clipping: bool = False
) -> tuple[jax.Array, jax.Array]:
    r"""Straight-through derivatives of ``round(clip(x / step)) * step``.

    With :math:`v = x / s` and :math:`q` its level,

    .. math::
        \frac{\partial \hat x}{\partial x} = [q_{min} < v < q_{max}], \qquad
        \frac{\partial \hat x}{\partial s} = \begin{cases}
            q - v & q_{min} < v < q_{max} \\ q & \text{otherwise} \end{cases}

    Args:
        x: Floats, any shape.
        step: Float32 steps that broadcast against ``x``.
        fmt: The number format. The outermost levels of one that is not of integers lie inside, and
            so does 0.
        clipping: Whether only clipped entries move the step, as in PACT.

    Returns:
        ``(inside, slope)``: booleans and float32, the derivatives with respect to ``x`` and
        ``step``.

    References:
        Esser et al., 2020, Learned Step Size Quantization. Choi et al., 2018, PACT: Parameterized
        Clipping Activation for Quantized Neural Networks.
    """
    low, high = fmt.grid.low, fmt.grid.high
    ratio = x.astype(jnp.float32) * (1 / step)
    level = fmt.grid.round(jnp.clip(ratio, low, high))
    if isinstance(fmt.grid, Integers):
        inside = ((ratio > low) & (ratio < high)) | (ratio == 0)
    else:
        inside = between_ends(ratio, fmt)
    return inside, jnp.where(inside, jnp.zeros_like(ratio) if clipping else level - ratio, level)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def scaled_gradient(x: jax.Array, factor: float) -> jax.Array:
    """``x``, with derivatives multiplied by ``factor``."""
    del factor
    return x


@scaled_gradient.defjvp
def _scaled_gradient_jvp(factor, primals, tangents):
    return primals[0], tangents[0] * factor


def least_step(start: jax.Array) -> jax.Array:
    """The least that a step may become that starts at ``start``."""
    return jnp.maximum(start / REACH, 2.0**-125)


def within_reach(step: jax.Array, least: jax.Array) -> jax.Array:
    """The step, brought back to within a factor of `REACH` of its start, which NaN becomes.

    The bounds are normal floats with normal reciprocals, so that a trained step is positive and
    finite whatever an optimizer did.
    """
    start, high = least * REACH, jnp.minimum(least * REACH**2, 2.0**125)
    return jnp.clip(jnp.where(jnp.isnan(step), start, step), least, high)
