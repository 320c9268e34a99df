"""Scores: how much each entry of a parameter matters. Entries with the lowest scores are pruned."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.compression import Parameter
from jaxopt_compress.sparsity.keys import impl_of, key_of, renewed, words_for
from jaxopt_compress.sparsity.loss_scores import grasp, snip, synflow
from jaxopt_compress.tree import named_leaves


class Score(NamedTuple):
    """A score of the entries of a parameter.

    Attributes:
        score: ``score(parameter, kept) -> scores`` of the parameter's shape, at least 0 unless
            ``signed``. It is called in ``init`` and at each update that renews the mask; statistics
            are there in ``init`` only, and the gradient in updates only.
        keep: ``keep(parameter) -> kept``: arrays that the score needs later, such as input norms
            from statistics. They become part of the optimizer's state, so keep little.
        advance: ``advance(parameter, kept) -> kept``, called at each update, for scores that
            accumulate gradients; or None.
        scope: What entries are compared with, unless `prune` says it: ``"leaf"``, ``"output"`` or
            ``"global"``.
        signed: Whether scores may be negative. Two that differ in the last bit alone may then count
            as equal.
        begins: The first step with a score; accumulated ones have none at step 0.
    """

    score: Callable[[Parameter, Any], jax.Array]
    keep: Callable[[Parameter], Any] = lambda parameter: None
    advance: Callable[[Parameter, Any], Any] | None = None
    scope: str = "leaf"
    signed: bool = False
    begins: int = 0


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
    return Score(_own, _zeros, _accumulated(term, decay), begins=1)


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
    return Score(_own, _zeros, _accumulated(term, decay), signed=True, begins=1)


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
        return 0.5 * kept * jnp.square(_wide(parameter.dense()))

    if decay is None:
        return Score(score, lambda parameter: _wide(parameter.stats.fisher))
    if decay == 1:
        raise ValueError("decay=1 would never forget the start; 0.99 is usual")
    mean = lambda parameter, w, g: (1 - decay) * jnp.square(g)
    return Score(score, _zeros, _accumulated(mean, decay), begins=1)


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
        moments = parameter.stats.second_moment
        return jnp.sqrt(jnp.diagonal(moments, axis1=-2, axis2=-1))

    def score(parameter: Parameter, kept: jax.Array) -> jax.Array:
        return parameter.from_matrix(jnp.abs(_wide(parameter.matrix())) * kept[..., :, None])

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

    def score(parameter: Parameter, kept: Any) -> jax.Array:
        del kept
        m = parameter.matrix()
        squares = jnp.square(_wide(m)).reshape(*m.shape[:-2], -1)
        order = jnp.argsort(squares, -1)
        ranked = jnp.take_along_axis(squares, order, -1)
        # From the largest down; of equal ones each has those behind it in the sum.
        rest = jnp.flip(jnp.cumsum(jnp.flip(ranked, -1), -1), -1)
        shares = ranked / jnp.where(rest > 0, rest, 1)
        found = jnp.take_along_axis(shares, jnp.argsort(order, -1), -1)
        return parameter.from_matrix(found.reshape(m.shape))

    return Score(score, scope="global")


def given(tree: Any, signed: bool = False) -> Score:
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

    return Score(_own, keep, signed=signed)


def as_score(score: Score | Callable[[Parameter], jax.Array]) -> Score:
    """A score, or a function of the parameter alone, as a score.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(score, Score):
        return score
    if not callable(score) or getattr(score, "__module__", None) == __name__:
        raise TypeError(
            f"score={getattr(score, '__name__', score)!r} is no score; "
            "jaxopt_compress.scores.magnitude() is one, and so is a function "
            "(parameter) -> scores"
        )
    return Score(lambda parameter, kept: score(parameter))


def gradient_of(parameter: Parameter) -> jax.Array:
    """The gradient at the view.

    Raises:
        ValueError: The update was given none.
    """
    if parameter.grad is None:
        raise ValueError(
            f"there is no gradient of {parameter.describe()}, which decides here: call "
            "update(state, params, grads=grads), as compressed_training does"
        )
    return parameter.grad


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _own(parameter: Parameter, kept: jax.Array) -> jax.Array:
    """What was accumulated is the score."""
    del parameter
    return kept


def _zeros(parameter: Parameter) -> jax.Array:
    return jnp.zeros(parameter.value.shape, jnp.float32)


def _accumulated(
    term: Callable[[Parameter, jax.Array, jax.Array], jax.Array], decay: float
) -> Callable[[Parameter, jax.Array], jax.Array]:
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay}; it is in [0, 1], 0.99 is usual")

    def advance(parameter: Parameter, kept: jax.Array) -> jax.Array:
        w, g = _wide(parameter.dense()), _wide(gradient_of(parameter))
        return (decay * kept + term(parameter, w, g)).astype(jnp.float32)

    return advance


_MAGNITUDE = Score(lambda parameter, kept: jnp.abs(parameter.dense()))

__all__ = [
    "Score",
    "fisher",
    "given",
    "grasp",
    "lamp",
    "magnitude",
    "movement",
    "random",
    "saliency",
    "snip",
    "synflow",
    "wanda",
]
