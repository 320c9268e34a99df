"""The error of a product, from that of its weight and the second moment of its inputs."""

import jax
import jax.numpy as jnp
from jax import lax


def output_energy(m: jax.Array, moment: jax.Array | None) -> jax.Array:
    r"""The mean squared output of a product, summed over its outputs.

    .. math:: E \|x^T M\|^2 = \mathrm{tr}(M^T H M), \qquad H = E[x x^T]

    Args:
        m: ``[*stack, k, n]``.
        moment: ``[*stack, k, k]``, one for each entry of the stack; or ``[k, k]`` for all of them;
            or None for the identity, which gives the squared Frobenius norm.

    Returns:
        Float32 ``[*stack]``.

    Example:
        >>> import jax.numpy as jnp
        >>> output_energy(jnp.array([[1.0], [2.0]]), jnp.array([[1.0, 0.5], [0.5, 1.0]])).item()
        7.0
    """
    m = m.astype(jnp.float32)
    seen = m
    if moment is not None:
        seen = jnp.matmul(moment.astype(jnp.float32), m, precision=lax.Precision.HIGHEST)
    # Rounding may make an energy that is nearly 0 negative.
    return jnp.maximum(jnp.sum(m * seen, (-2, -1)), 0)
