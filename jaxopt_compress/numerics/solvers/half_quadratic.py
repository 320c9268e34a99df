"""HQQ: the grid with the least error in a norm that forgives outliers, without data."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.numerics.codes import round_to_grid
from jaxopt_compress.numerics.formats import Format


@functools.partial(jax.jit, static_argnames=("axes", "fmt", "power", "iterations"))
def half_quadratic(
    x: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    axes: tuple[int, ...],
    fmt: Format,
    power: float = 0.7,
    iterations: int = 20,
) -> tuple[jax.Array, jax.Array | None]:
    r"""Steps and integer zero points with a small error in an :math:`l_p` norm, :math:`p < 1`.

    It alternates between the part :math:`E` of the error that counts as outliers and the grid that
    fits what is left in least squares:

    .. math:: E \leftarrow \mathrm{shrink}_p(W - \hat W, \beta), \qquad
        s \leftarrow \frac{\langle W - E, Q - z \rangle}{\langle Q - z, Q - z \rangle}, \qquad
        z \leftarrow \mathrm{round}(\mathrm{mean}(Q - (W - E) / s))

    with :math:`Q` the nearest levels and :math:`\beta` growing. The best grid on the way is taken,
    the first one included.

    Args:
        x: Float32, any shape.
        scale: Float32, of size 1 along ``axes``.
        zero: Integers likewise, or None.
        axes: The axes along which entries share a step.
        fmt: The number format.
        power: The norm's :math:`p`.
        iterations: How often the grid is fitted.

    Returns:
        ``(scale, zero)`` of the same shapes and types.

    References:
        Badri and Shaji, 2023, Half-Quadratic Quantization of Large Machine Learning Models.
    """

    def view(scale: jax.Array, zero: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        levels, _ = round_to_grid(x, scale, zero, fmt)
        shifted = levels if zero is None else levels - zero.astype(jnp.float32)
        wrong = x - shifted * scale
        return levels, shifted, wrong

    # The size of errors is measured in mean magnitudes of the entries that share a step.
    unit = jnp.maximum(jnp.mean(jnp.abs(x), axes, keepdims=True), jnp.finfo(jnp.float32).tiny)

    def cost(wrong: jax.Array) -> jax.Array:
        return jnp.sum(jnp.abs(wrong / unit) ** power, axes, keepdims=True)

    def shrink(wrong: jax.Array, beta: jax.Array) -> jax.Array:
        size = jnp.abs(wrong / unit)
        less = size - jnp.where(size > 0, size, 1) ** (power - 1) / beta
        return jnp.sign(wrong) * unit * jnp.maximum(less, 0)

    def fit(carry, beta):
        (scale, zero), best, least = carry
        levels, shifted, wrong = view(scale, zero)
        target = x - shrink(wrong, beta)
        energy = jnp.sum(shifted * shifted, axes, keepdims=True)
        fitted = jnp.sum(target * shifted, axes, keepdims=True) / jnp.where(energy > 0, energy, 1)
        scale = jnp.where(fitted > 0, fitted, scale)
        if zero is not None:
            middle = jnp.round(jnp.mean(levels - target / scale, axes, keepdims=True))
            zero = jnp.clip(middle, fmt.grid.low, fmt.grid.high).astype(zero.dtype)
        new = cost(view(scale, zero)[2])
        better = new < least
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), (scale, zero), best)
        return ((scale, zero), best, jnp.where(better, new, least)), None

    start = (scale, zero)
    betas = 10 * jnp.power(1.01, jnp.arange(iterations, dtype=jnp.float32))
    carry = (start, start, cost(view(scale, zero)[2]))
    (_, best, _), _ = lax.scan(fit, carry, betas)
    return best
