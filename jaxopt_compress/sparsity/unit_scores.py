"""Scores of whole outputs and inputs: all entries of one have the same."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.compression import Parameter
from jaxopt_compress.sparsity.score import Score, statistic, wide
from jaxopt_compress.typing import PyTree


def fpgm() -> Score:
    r"""Scores outputs by how far they are from the others, so that what others can replace goes.

    .. math:: s_n = \sum_m \lVert w_{\cdot n} - w_{\cdot m} \rVert_2

    An output near the geometric median of all has a low score, whatever its size. It is meant for
    ``prune(pattern="channels")`` and for `Groups.scores` with ``reduce="sum"``.

    Returns:
        The score, of outputs of the same parameter, and of the same entry of a stack.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jnp.array([[5.0, 5.1, 0.1], [1.0, 1.0, 0.0]])}
        >>> prune = jc.prune(jc.scores.fpgm(), jc.schedules.constant(1 / 3), pattern="channels")
        >>> jc.materialize(jc.compress(params, prune, layout="in,out"))["w"][0]
        Array([0. , 5.1, 0.1], dtype=float32)

    References:
        He et al., 2019, Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
        Acceleration.
    """

    def score(parameter: Parameter, kept: PyTree) -> jax.Array:
        del kept
        m = wide(parameter.matrix())
        # One output against all others at a time; a difference of squares would cancel.
        far = lambda m: lax.map(lambda w: jnp.sum(jnp.linalg.norm(m - w[:, None], axis=0)), m.T)
        lead, k, n = m.shape[:-2], *m.shape[-2:]
        found = jax.vmap(far)(m.reshape(-1, k, n)).reshape(*lead, 1, n)
        return parameter.from_matrix(jnp.broadcast_to(found, m.shape))

    return Score(score)


def apoz() -> Score:
    r"""Scores inputs by how often they are not 0, as after a ReLU.

    .. math:: s_k = 1 - P(x_k = 0)

    The average percentage of zeros of a neuron, channel or head is that of the activations that
    meet the next parameter. So the score is one of inputs: for ``prune(pattern="inputs")`` of the
    next parameter, and for `Groups.scores` with ``reduce="sum"``. Zeros around images count for
    convolutions.

    Returns:
        The score; it needs statistics, by ``calibrate(..., measures=(jc.measures.zeros(),))``.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jnp.ones((2, 1))}
        >>> model = lambda params, x: x @ params["w"]
        >>> measures = (jc.measures.zeros(),)
        >>> x = jnp.array([[0.0, 3.0], [0.0, 0.0], [1.0, 2.0]])
        >>> stats = jc.calibrate(model, params, [x], measures=measures)
        >>> prune = jc.prune(jc.scores.apoz(), jc.schedules.constant(0.5), pattern="inputs")
        >>> jc.materialize(jc.compress(params, prune, stats=stats, layout="in,out"))["w"][:, 0]
        Array([0., 1.], dtype=float32)

    References:
        Hu et al., 2016, Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient
        Deep Architectures.
    """
    return Score(_of_inputs, lambda parameter: 1 - parameter.stats.zero_fraction)


def mean_activation() -> Score:
    r"""Scores inputs by their mean magnitude.

    .. math:: s_k = E \lvert x_k \rvert

    Returns:
        A score of inputs, as `apoz`; it needs ``calibrate(..., measures=(jc.measures.means(),))``.

    References:
        Molchanov et al., 2017, Pruning Convolutional Neural Networks for Resource Efficient
        Inference.
    """
    return Score(_of_inputs, lambda parameter: statistic(parameter, "means", "mean_magnitude"))


def _of_inputs(parameter: Parameter, kept: jax.Array) -> jax.Array:
    shape = jax.eval_shape(parameter.matrix).shape
    return parameter.from_matrix(jnp.broadcast_to(kept[..., :, None], shape).astype(jnp.float32))
