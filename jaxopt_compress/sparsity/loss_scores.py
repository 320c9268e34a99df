"""Scores that one call computes from a loss, before training: trees for ``scores.given``."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxopt_compress.tree import combine, partition
from jaxopt_compress.typing import PyTree


def snip(loss: Callable[..., jax.Array], params: PyTree, *args: PyTree) -> PyTree:
    r"""How sensitive a loss is to each connection: :math:`|w \, \partial L / \partial w|`.

    Args:
        loss: ``loss(params, *args) -> scalar``.
        params: A pytree; of its leaves those of floats are scored.
        *args: Such as one batch.

    Returns:
        A tree of the structure of ``params``, None in the place of leaves that are no floats.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> loss = lambda params, x: jnp.sum((x @ params["w"]) ** 2)
        >>> params = {"w": jnp.array([[1.0], [-2.0]])}
        >>> by = jc.scores.snip(loss, params, jnp.array([[3.0, 1.0]]))
        >>> jc.compress(params, jc.prune(jc.scores.given(by), jc.schedules.constant(0.5)))["w"]
        SparseArray(sparse, float32[2,1], ...)

    References:
        Lee et al., 2019, SNIP: Single-shot Network Pruning based on Connection Sensitivity.
    """
    floats, slopes = _floats(loss, params, args)
    return jax.tree.map(lambda w, g: jnp.abs(w * g), floats, slopes(floats))


def grasp(loss: Callable[..., jax.Array], params: PyTree, *args: PyTree) -> PyTree:
    r"""How much each connection adds to the flow of gradients: :math:`w \, (H g)`.

    Args:
        loss: ``loss(params, *args) -> scalar``, twice differentiable.
        params: A pytree; of its leaves those of floats are scored.
        *args: Such as one batch.

    Returns:
        As `snip`. Scores may be negative: ``scores.given(tree, signed=True)``. An entry with a low
        one holds the gradient back.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> loss = lambda params: jnp.sum(params["w"] ** 3)  # g is 3 w^2 and H is 6 w
        >>> jc.scores.grasp(loss, {"w": jnp.array([1.0, -1.0])})["w"]
        Array([18., 18.], dtype=float32)

    References:
        Wang et al., 2020, Picking Winning Tickets Before Training by Preserving Gradient Flow.
    """
    floats, slopes = _floats(loss, params, args)
    products = jax.jvp(slopes, (floats,), (slopes(floats),))[1]
    return jax.tree.map(lambda w, p: w * p, floats, products)


def synflow(fn: Callable[..., PyTree], params: PyTree, *inputs: PyTree) -> PyTree:
    r"""How much each connection adds to the output of the network of magnitudes; no data.

    .. math:: |w| \, \partial R / \partial |w|, \qquad R = \sum f(|w|, \mathbf 1)

    It is meant for many rounds, each with the view of the one before as parameters:

        for density in 0.1 ** (np.arange(1, 101) / 100):
            by = jc.scores.given(jc.scores.synflow(fn, view, x))
            c = jc.prune(by, jc.schedules.constant(1 - density), scope="global")
            state = c.init(params)
            view = c.apply(params, state)

    Args:
        fn: ``fn(params, *inputs) -> outputs``, a network whose activations do not fall.
        params: A pytree; of its leaves those of floats are scored.
        *inputs: Of the shapes of inputs; of floats only the shape counts.

    Returns:
        As `snip`.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> fn = lambda params, x: x @ params["a"] @ params["b"]
        >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[-3.0], [0.5]])}
        >>> jc.scores.synflow(fn, params, jnp.zeros((1, 1)))["a"]
        Array([[3., 1.]], dtype=float32)

    References:
        Tanaka et al., 2020, Pruning Neural Networks without any Data by Iteratively Conserving
        Synaptic Flow.
    """
    ones = lambda x: jnp.ones_like(x) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x

    def total(params: PyTree) -> jax.Array:
        outputs = jax.tree.leaves(fn(params, *jax.tree.map(ones, inputs)))
        return sum(jnp.sum(y) for y in outputs)  # pyright: ignore[reportReturnType]

    floats, slopes = _floats(total, params, ())
    magnitudes = jax.tree.map(jnp.abs, floats)
    return jax.tree.map(lambda w, g: jnp.abs(w * g), magnitudes, slopes(magnitudes))


def _floats(
    loss: Callable[..., jax.Array], params: PyTree, args: tuple[PyTree, ...]
) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """The floating leaves, and the gradient as a function of them."""
    floats, rest = partition(params)
    return floats, jax.grad(lambda floats: loss(combine(floats, rest), *args))
