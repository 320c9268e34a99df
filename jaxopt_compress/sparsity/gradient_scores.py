"""Scores that accumulate gradients, and the Fisher information."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxopt_compress.compression import Parameter
from jaxopt_compress.sparsity.score import Score, accumulated, gradient_of, statistic, wide


def saliency(decay: float = 0.99) -> Score:
    r"""Scores entries by how much the loss would change without them, to first order.

    .. math:: s \leftarrow d \, s + |w \, g|

    with the gradient :math:`g` at the view, at each update; where an entry is pruned it says how
    much the loss would gain from it.

    Args:
        decay: ``d`` per step, in [0, 1]; 1 sums over all steps.

    Returns:
        The score; it needs updates with gradients, so a schedule that prunes from step 1 on or
        later. It keeps one float32 array per parameter in the state.

    Raises:
        ValueError: The decay is out of range.

    References:
        Molchanov et al., 2017, Pruning Convolutional Neural Networks for Resource Efficient
        Inference.
    """
    term = lambda parameter, w, g: jnp.abs(w * g)
    return Score(accumulated, _zeros, _accumulated(term, decay), begins=1)


def movement(decay: float = 1.0) -> Score:
    r"""Scores entries by how far training moves them away from 0.

    .. math:: s \leftarrow d \, s - w \, g

    It needs gradients of pruned entries too: take it with ``prune(backward="straight_through")``.

    Args:
        decay: ``d`` per step, in [0, 1]; 1, as in the paper, sums over all steps.

    Returns:
        The score, which may be negative; it needs updates with gradients, as `saliency` does.

    Raises:
        ValueError: The decay is out of range.

    References:
        Sanh et al., 2020, Movement Pruning: Adaptive Sparsity by Fine-Tuning.
    """
    term = lambda parameter, w, g: -w * g
    return Score(accumulated, _zeros, _accumulated(term, decay), signed=True, begins=1)


def fisher(decay: float | None = None) -> Score:
    r"""Scores entries by how much the loss would change without them, to second order.

    .. math:: s = \tfrac12 w^2 \, E[g^2]

    with the diagonal of the empirical Fisher information in the place of the Hessian.

    Args:
        decay: None to take :math:`E[g^2]` from statistics, which
            ``calibrate(..., measures=(jc.measures.fisher(),))`` measures; or the decay per step of
            a running mean over the gradients of training, in [0, 1).

    Returns:
        The score. It keeps one float32 array per parameter in the state; with ``decay`` it needs
        updates with gradients, as `saliency` does.

    Raises:
        ValueError: The decay is out of range.

    References:
        LeCun et al., 1989, Optimal Brain Damage. Theis et al., 2018, Faster gaze prediction with
        dense networks and Fisher pruning.
    """

    def score(parameter: Parameter, kept: jax.Array) -> jax.Array:
        return 0.5 * kept * jnp.square(wide(parameter.dense()))

    if decay is None:
        return Score(score, lambda parameter: wide(statistic(parameter, "fisher", "fisher")))
    if decay == 1:
        raise ValueError("decay=1 would never forget the start; 0.99 is usual")
    mean = lambda parameter, w, g: (1 - decay) * jnp.square(g)
    return Score(score, _zeros, _accumulated(mean, decay), begins=1)


def _zeros(parameter: Parameter) -> jax.Array:
    return jnp.zeros(parameter.value.shape, jnp.float32)


def _accumulated(
    term: Callable[[Parameter, jax.Array, jax.Array], jax.Array], decay: float
) -> Callable[[Parameter, jax.Array], jax.Array]:
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay}; it is in [0, 1], 0.99 is usual")

    def advance(parameter: Parameter, kept: jax.Array) -> jax.Array:
        w, g = wide(parameter.dense()), wide(gradient_of(parameter))
        return (decay * kept + term(parameter, w, g)).astype(jnp.float32)

    return advance
