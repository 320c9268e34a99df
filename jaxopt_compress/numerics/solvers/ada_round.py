"""Rounding up or down as a relaxation says that is learned from second moments."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxopt_compress.numerics.formats import Format
from jaxopt_compress.numerics.solvers.factor import conditioned
from jaxopt_compress.numerics.solvers.grids import Grid, per_entry

_RATE, _WEIGHT = 1e-2, 1e-2
_FREE = 0.2  # of the steps, in which nothing pulls towards 0 and 1
_SHARP = (20.0, 2.0)  # the exponent, from the first step that pulls to the last


@functools.partial(jax.jit, static_argnames=("fmt", "steps"))
def ada_round(
    w: jax.Array, moment: jax.Array, grid: Grid, fmt: Format, steps: int = 1000
) -> jax.Array:
    r"""Levels of integers next to the entries, with a small error of products.

    Each entry lies between two levels, and :math:`h \in [0, 1]` of the way up,

    .. math:: h(V) = \mathrm{clip}(1.2 \, \sigma(V) - 0.1, 0, 1), \qquad
        \min_V \; \mathrm{tr}(D^T H D) + \lambda \sum (1 - |2 h(V) - 1|^\beta)

    by Adam, with :math:`\beta` falling from 20 to 2, which drives :math:`h` to 0 or 1. Errors are
    measured in steps, and :math:`H` in its mean diagonal, so that :math:`\lambda` suits any scale.
    Columns for which the nearest levels are better keep those.

    Args:
        w: ``[*stack, k, n]``, of which ``k`` is summed over.
        moment: ``[*stack, k, k]``: ``E[x x^T]`` of what it meets.
        grid: The values that entries may take.
        fmt: The number format, one of integers.
        steps: How many steps of Adam.

    Returns:
        Float32 levels of the shape of ``w``, with zero points still added.

    References:
        Nagel et al., 2020, Up or Down? Adaptive Rounding for Post-Training Quantization.
    """

    def one(w: jax.Array, moment: jax.Array, grid: Grid) -> jax.Array:
        h = conditioned(moment)
        h = h / jnp.maximum(jnp.mean(jnp.diagonal(h)), jnp.finfo(jnp.float32).tiny)
        nearest = grid.levels(w, fmt)
        low = grid.levels(w - grid.scale / 2, fmt)
        bottom = grid.values(low, fmt)
        high = grid.levels(bottom + grid.scale, fmt)
        width = grid.values(high, fmt) - bottom
        unit = jnp.maximum(jnp.mean(grid.scale, 0), jnp.finfo(jnp.float32).tiny)

        def pull(wrong: jax.Array) -> jax.Array:
            return jnp.matmul(h, wrong, precision=lax.Precision.HIGHEST)

        def loss(v: jax.Array, at: jax.Array) -> jax.Array:
            up = between(v)
            wrong = (bottom + up * width - w) / unit
            return jnp.sum(wrong * pull(wrong)) + _WEIGHT * jnp.sum(pull_at(at)(up))

        adam = optax.adam(_RATE)

        def step(carry, at):
            v, state = carry
            updates, state = adam.update(jax.grad(loss)(v, at), state, v)
            return (v + updates, state), None

        share = jnp.where(width > 0, (w - bottom) / jnp.where(width > 0, width, 1), 0)
        start = logit(jnp.clip(share, 0.01, 0.99))
        times = jnp.arange(steps, dtype=jnp.float32) / steps
        (v, _), _ = lax.scan(step, (start, adam.init(start)), times)
        learned = jnp.where(between(v) >= 0.5, high, low)
        wrong = [grid.values(x, fmt) - w for x in (learned, nearest)]
        errors = [jnp.sum(d * pull(d), 0) for d in wrong]
        return jnp.where(errors[0] < errors[1], learned, nearest)

    args = (w.astype(jnp.float32), moment.astype(jnp.float32), grid)
    return per_entry(one, w.ndim - 2)(*args)


def between(v: jax.Array) -> jax.Array:
    """The soft choice, in [0, 1]."""
    return jnp.clip(1.2 * jax.nn.sigmoid(v) - 0.1, 0, 1)


def logit(up: jax.Array) -> jax.Array:
    """Inverts `between`; keep off 0 and 1, where it has no slope."""
    return jax.scipy.special.logit((up + 0.1) / 1.2)


def pull_at(at: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """What drives soft choices to 0 and 1 at a time from 0 to 1; at first nothing does."""
    beta = _SHARP[0] + (_SHARP[1] - _SHARP[0]) * jnp.maximum(at - _FREE, 0) / (1 - _FREE)
    # The distance is kept above 0, so that its powers have slopes.
    pull = lambda up: 1 - jnp.maximum(jnp.abs(2 * up - 1), 1e-6) ** beta
    return lambda up: jnp.where(at < _FREE, 0, pull(up))
