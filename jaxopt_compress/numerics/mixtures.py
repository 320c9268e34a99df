"""Mixtures of Gaussians over the entries of a parameter."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Gamma priors of precisions, of the component at 0 and of the others, as in the paper; and the Beta
# prior of the share of the first.
_AT_ZERO, _OTHERS, _SHARE = (5000.0, 2.0), (250.0, 0.1), (5000.0, 2.0)


class Mixture(NamedTuple):
    """Components of Gaussians, the first of which is at 0.

    Attributes:
        means: ``[..., components]``; the first counts as 0.
        log_scales: An array of that shape: logarithms of standard deviations.
        logits: An array of that shape: the shares of components are their softmax.
    """

    means: jax.Array
    log_scales: jax.Array
    logits: jax.Array


def spread(low: jax.Array, high: jax.Array, components: int, share: float) -> Mixture:
    """Components evenly from ``low`` to ``high``, each ``[...]``, beside one at 0 of a share."""
    along = jnp.linspace(0.0, 1.0, components - 1, dtype=low.dtype)
    # No difference, which may overflow.
    means = low[..., None] * (1 - along) + high[..., None] * along
    means = jnp.concatenate([jnp.zeros_like(means[..., :1]), means], -1)
    # Of equal entries a share of their size, and never 0, whose logarithm is infinite.
    size = jnp.maximum(jnp.maximum(jnp.abs(low), jnp.abs(high)) * 1e-6, 2.0**-100)
    width = jnp.maximum(0.5 * high - 0.5 * low, size)[..., None] / (2 * max(components - 2, 1))
    scales = jnp.broadcast_to(jnp.log(width), means.shape)
    rest = math.log((1 - share) / (components - 1))
    logits = jnp.full(means.shape, rest, low.dtype).at[..., 0].set(math.log(share))
    return Mixture(means, scales, logits)


def log_joint(x: jax.Array, mixture: Mixture, k: int) -> jax.Array:
    """The logarithm of a component's share times its density.

    Args:
        x: ``[..., members]``.
        mixture: ``[..., components]``.
        k: Which component.

    Returns:
        ``[..., members]``.
    """
    at = lambda a: a[..., k, None]
    share = at(jax.nn.log_softmax(mixture.logits))
    mean = jnp.zeros_like(share) if k == 0 else at(mixture.means)
    scale = at(mixture.log_scales)
    u = (x - mean) * jnp.exp(-scale)
    return share - scale - 0.5 * u * u - 0.5 * math.log(2 * math.pi)


def negative_log_likelihood(x: jax.Array, mixture: Mixture) -> jax.Array:
    """Of all members, ``[...]``: component after component, so that memory does not grow with them.

    Args:
        x: ``[..., members]``.
        mixture: ``[..., components]``.

    Example:
        >>> import jax.numpy as jnp
        >>> one = Mixture(jnp.zeros((1,)), jnp.zeros((1,)), jnp.zeros((1,)))
        >>> negative_log_likelihood(jnp.array([0.0, 2.0]), one).round(1)  # log(2 pi) + 2
        Array(3.8, dtype=float32)
    """
    total = log_joint(x, mixture, 0)
    for k in range(1, mixture.means.shape[-1]):
        total = jnp.logaddexp(total, log_joint(x, mixture, k))
    return -jnp.sum(total, -1)


def negative_log_prior(mixture: Mixture) -> jax.Array:
    """Priors of precisions (Gamma) and of the share at 0 (Beta), ``[...]``: none becomes a point.

    Args:
        mixture: ``[..., components]``.
    """
    log_precision = -2 * mixture.log_scales
    gamma = lambda p, prior: prior[1] * jnp.exp(p) - (prior[0] - 1) * p
    total = gamma(log_precision[..., 0], _AT_ZERO)
    total = total + jnp.sum(gamma(log_precision[..., 1:], _OTHERS), -1)
    shares = jax.nn.log_softmax(mixture.logits)
    rest = jax.nn.logsumexp(shares[..., 1:], -1)
    return total - (_SHARE[0] - 1) * shares[..., 0] - (_SHARE[1] - 1) * rest


def most_likely(x: jax.Array, mixture: Mixture) -> jax.Array:
    """The component that each member most likely comes from; of equals the first, which has all 0s.

    Args:
        x: ``[..., members]``.
        mixture: ``[..., components]``.

    Returns:
        int32 ``[..., members]``; the last component where ``x`` is NaN.
    """
    best, at = log_joint(x, mixture, 0), jnp.zeros(x.shape, jnp.int32)
    for k in range(1, mixture.means.shape[-1]):
        own = log_joint(x, mixture, k)
        # Not own > best, which is false for NaN.
        at = jnp.where(own <= best, at, k)
        best = jnp.where(own <= best, best, own)
    return jnp.where(x == 0, 0, at)
