"""Scores: how much each entry of a parameter matters. Entries with the lowest scores are pruned."""

import jax
import jax.numpy as jnp

from jaxopt_compress.compression import Parameter
from jaxopt_compress.sparsity.gradient_scores import fisher, movement, saliency
from jaxopt_compress.sparsity.keys import impl_of, key_of, renewed, words_for
from jaxopt_compress.sparsity.loss_scores import grasp, snip, synflow
from jaxopt_compress.sparsity.score import Score, accumulated, statistic, wide
from jaxopt_compress.sparsity.unit_scores import apoz, fpgm, mean_activation
from jaxopt_compress.tree import named_leaves
from jaxopt_compress.typing import PyTree


def magnitude() -> Score:
    """Scores entries by their absolute value.

    Returns:
        The score ``|w|``.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> prune = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5))
        >>> jc.compress({"w": jnp.array([[-2.0, 1.0]])}, prune)["w"].materialize()
        Array([[-2.,  0.]], dtype=float32)

    References:
        Han et al., 2015, Learning both Weights and Connections for Efficient Neural Networks.
    """
    return _MAGNITUDE


def is_magnitude(score: Score) -> bool:
    """Whether a score ranks entries by their absolute value."""
    return score is _MAGNITUDE


def random(key: jax.Array, renew: bool = False) -> Score:
    """Scores entries by chance.

    Args:
        key: A random key. Each parameter has numbers of its own, by its path.
        renew: Whether numbers are new at every update. By default they stay, so that a growing
            sparsity only adds to what is pruned.

    Returns:
        The score, uniform in [0, 1).

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> prune = jc.prune(jc.scores.random(jax.random.key(0)), jc.schedules.constant(0.5))
        >>> int(jnp.sum(jc.compress({"w": jnp.ones((4, 4))}, prune)["w"].materialize()))
        8
    """
    impl = impl_of(key)

    def score(parameter: Parameter, words: jax.Array) -> jax.Array:
        return jax.random.uniform(key_of(words, impl), parameter.value.shape)

    advance = lambda parameter, words: renewed(words, impl)
    keep = lambda parameter: words_for(key, parameter.path)
    return Score(score, keep, advance if renew else None)


def wanda() -> Score:
    r"""Scores entries by their magnitude and the norm of the input that they meet.

    .. math:: s_{kn} = |w_{kn}| \sqrt{E[x_k^2]}

    Entries are compared with those of the same output.

    Returns:
        The score; it needs statistics with second moments, as `calibrate` takes them by default.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jnp.array([[1.0], [2.0], [3.0], [4.0]])}
        >>> model = lambda params, x: x @ params["w"]
        >>> stats = jc.calibrate(model, params, [jnp.array([[100.0, 10.0, 1.0, 0.1]])])
        >>> prune = jc.prune(jc.scores.wanda(), jc.schedules.constant(0.5))
        >>> jc.compress(params, prune, stats=stats, layout="in,out")["w"].materialize()[:, 0]
        Array([1., 2., 0., 0.], dtype=float32)

    References:
        Sun et al., 2024, A Simple and Effective Pruning Approach for Large Language Models.
    """

    def norms(parameter: Parameter) -> jax.Array:
        moments = statistic(parameter, "moments", "second_moment")
        return jnp.sqrt(jnp.diagonal(moments, axis1=-2, axis2=-1))

    def score(parameter: Parameter, kept: jax.Array) -> jax.Array:
        return parameter.from_matrix(jnp.abs(wide(parameter.matrix())) * kept[..., :, None])

    return Score(score, norms, scope="output")


def lamp() -> Score:
    r"""Scores entries by magnitude, so that they can be compared between layers.

    .. math:: s_u = w_u^2 \, / \sum_{v: |w_v| \ge |w_u|} w_v^2

    over the entries of the same parameter, and of the same entry of a stack. Entries of all
    parameters are compared; the largest of each always stays.

    Returns:
        The score. It sorts each parameter.

    References:
        Lee et al., 2021, Layer-Adaptive Sparsity for the Magnitude-Based Pruning.
    """

    def score(parameter: Parameter, kept: PyTree) -> jax.Array:
        del kept
        m = parameter.matrix()
        squares = jnp.square(wide(m)).reshape(*m.shape[:-2], -1)
        order = jnp.argsort(squares, -1)
        ranked = jnp.take_along_axis(squares, order, -1)
        # From the largest down; of equal ones each has those behind it in the sum.
        rest = jnp.flip(jnp.cumsum(jnp.flip(ranked, -1), -1), -1)
        shares = ranked / jnp.where(rest > 0, rest, 1)
        found = jnp.take_along_axis(shares, jnp.argsort(order, -1), -1)
        return parameter.from_matrix(found.reshape(m.shape))

    return Score(score, scope="global")


def given(tree: PyTree, signed: bool = False) -> Score:
    """Scores that were computed before, such as by `snip`, `grasp` or `synflow`.

    Args:
        tree: A pytree of arrays with the paths and shapes of the parameters.
        signed: Whether they may be negative, as those of `grasp`.

    Returns:
        The score. Its arrays become part of the state.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params, by = {"w": jnp.array([[1.0, 2.0]])}, {"w": jnp.array([[3.0, 1.0]])}
        >>> jc.compress(params, jc.prune(jc.scores.given(by), threshold=2.0))["w"].materialize()
        Array([[1., 0.]], dtype=float32)
    """
    arrays = dict(named_leaves(tree))

    def keep(parameter: Parameter) -> jax.Array:
        if parameter.path not in arrays:
            raise ValueError(
                f"scores.given has nothing for {parameter.describe()}, but for "
                f"{', '.join(sorted(arrays)[:8])}"
            )
        return jnp.asarray(arrays[parameter.path])

    return Score(accumulated, keep, signed=signed)


def _magnitude(parameter: Parameter, kept: PyTree) -> jax.Array:
    return jnp.abs(parameter.dense())


_MAGNITUDE = Score(_magnitude)

__all__ = [
    "Score",
    "apoz",
    "fisher",
    "fpgm",
    "given",
    "grasp",
    "lamp",
    "magnitude",
    "mean_activation",
    "movement",
    "random",
    "saliency",
    "snip",
    "synflow",
    "wanda",
]
