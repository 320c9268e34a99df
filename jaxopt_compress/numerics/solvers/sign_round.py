"""Rounding up or down as gradients of the error of products say."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.numerics.formats import Format
from jaxopt_compress.numerics.solvers.factor import conditioned
from jaxopt_compress.numerics.solvers.grids import Grid, per_entry


@functools.partial(jax.jit, static_argnames=("fmt", "steps"))
def sign_round(
    w: jax.Array, moment: jax.Array, grid: Grid, fmt: Format, steps: int = 200
) -> jax.Array:
    r"""Levels of integers next to the entries, with a small error of products.

    Signed gradient descent moves each entry by :math:`V \in [-1/2, 1/2]` steps before rounding,

    .. math:: V \leftarrow \mathrm{clip}(V - \eta_t \, \mathrm{sign}(H D), -1/2, 1/2), \qquad
        D = \hat W(V) - W

    with :math:`\eta_t` falling linearly from ``1 / steps`` to 0. The best levels on the way are
    taken, column by column, those of the nearest included.

    Args:
        w: ``[*stack, k, n]``, of which ``k`` is summed over.
        moment: ``[*stack, k, k]``: ``E[x x^T]`` of what it meets.
        grid: The values that entries may take.
        fmt: The number format, one of integers.
        steps: How many steps of descent.

    Returns:
        Float32 levels of the shape of ``w``, with zero points still added.

    References:
        Cheng et al., 2024, Optimize Weight Rounding via Signed Gradient Descent for the
        Quantization of LLMs.
    """

    def one(w: jax.Array, moment: jax.Array, grid: Grid) -> jax.Array:
        h = conditioned(moment)

        def step(carry, rate):
            shift, best, least = carry
            levels = grid.levels(w + shift * grid.scale, fmt)
            wrong = grid.values(levels, fmt) - w
            pull = jnp.matmul(h, wrong, precision=lax.Precision.HIGHEST)
            error = jnp.sum(wrong * pull, 0)
            better = error < least
            best = jnp.where(better, levels, best)
            shift = jnp.clip(shift - rate * jnp.sign(pull), -0.5, 0.5)
            return (shift, best, jnp.where(better, error, least)), None

        rates = jnp.linspace(1, 0, steps, endpoint=False, dtype=jnp.float32) / steps
        # One more, whose move nobody sees: it measures where the last one has led.
        rates = jnp.append(rates, 0)
        start = (jnp.zeros_like(w), grid.levels(w, fmt), jnp.full_like(w[0], jnp.inf))
        return lax.scan(step, start, rates)[0][1]

    args = (w.astype(jnp.float32), moment.astype(jnp.float32), grid)
    return per_entry(one, w.ndim - 2)(*args)
