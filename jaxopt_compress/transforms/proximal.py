"""Proximal steps: penalties whose minima are exact zeros, as optax transformations.

Each is the last one of a chain, after the learning rate:

    optax.chain(optax.adam(1e-3), jc.proximal.l1(1e-6))

A step is ``prox(w + u)`` instead of ``w + u``. Its weight is that of the penalty in the loss times
the learning rate; a schedule of the weight follows one of the rate.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_compress.tree import Where, fits, map_named, named_leaves
from jaxopt_compress.tree.layout import assume_layout
from jaxopt_compress.typing import Leaf, PyTree

Weight = float | Callable[[Any], Any]


class ProximalState(NamedTuple):
    """The state of proximal steps.

    Attributes:
        count: int32, how many there were.
    """

    count: jax.Array


def l1(weight: Weight, where: Where = None) -> optax.GradientTransformation:
    r"""Proximal steps of :math:`\lambda \sum |w|`: entries move towards 0 by the weight, up to 0.

    Args:
        weight: :math:`\lambda` times the learning rate; a number, or a function of the step.
        where: Which parameters; by default the floating ones of rank 2 and more.

    Returns:
        An optax transformation, which needs ``params``.

    Example:
        >>> import jax.numpy as jnp, optax, jaxopt_compress as jc
        >>> tx = optax.chain(optax.sgd(1.0), jc.proximal.l1(0.5))
        >>> params = {"w": jnp.array([[2.0, 0.25]])}
        >>> updates, _ = tx.update({"w": jnp.array([[1.0, 0.0]])}, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["w"]
        Array([[0.5, 0. ]], dtype=float32)

    References:
        Parikh and Boyd, 2014, Proximal Algorithms.
    """
    return _proximal(lambda w, by: _shrunk(w, by, jnp.abs(w)), weight, where)


def group_lasso(
    weight: Weight, groups: str = "channels", where: Where = None, layout: str = "in,out"
) -> optax.GradientTransformation:
    r"""Proximal steps of :math:`\lambda \sum_g \sqrt{n_g} \, \lVert w_g \rVert_2`: whole groups.

    Args:
        weight: As in `l1`.
        groups: ``"channels"``: a group is all that an output sums over; ``"inputs"``: all that an
            entry of the last contracted axis goes to. Entries of a stack are apart.
        where: As in `l1`.
        layout: Which axes are which, ``"in,out"`` or ``"out,in"``, as in `compress`.

    Returns:
        An optax transformation, which needs ``params``.

    Raises:
        ValueError: Other groups or another layout.

    References:
        Yuan and Lin, 2006, Model Selection and Estimation in Regression with Grouped Variables.
        Wen et al., 2016, Learning Structured Sparsity in Deep Neural Networks.
    """
    if groups not in ("channels", "inputs"):
        raise ValueError(f"groups={groups!r}; there are 'channels' and 'inputs'")
    assume_layout((1, 1), layout)

    def prox(w: jax.Array, by: jax.Array) -> jax.Array:
        roles = assume_layout(w.shape, layout)
        others = (*roles.stack, roles.group_axis)
        inside = tuple(d for d in range(-w.ndim, 0) if d not in others)
        axes = roles.contracting if groups == "channels" else inside
        squares = jnp.sum(jnp.square(w), axes, keepdims=True)
        size = w.size / max(squares.size, 1)
        return _shrunk(w, by * size**0.5, jnp.sqrt(squares))

    return _proximal(prox, weight, where)


def nuclear(
    weight: Weight, where: Where = None, layout: str = "in,out"
) -> optax.GradientTransformation:
    r"""Proximal steps of :math:`\lambda \sum \sigma_i(W)`: singular values move towards 0.

    Args:
        weight: As in `l1`.
        where: As in `l1`.
        layout: As in `group_lasso`: contracted axes are the rows of the matrix, and entries of a
            stack are matrices of their own.

    Returns:
        An optax transformation, which needs ``params``, and decomposes each matrix at each step.

    Raises:
        ValueError: Another layout.

    References:
        Cai et al., 2010, A Singular Value Thresholding Algorithm for Matrix Completion.
    """
    assume_layout((1, 1), layout)

    def prox(w: jax.Array, by: jax.Array) -> jax.Array:
        roles = assume_layout(w.shape, layout)
        rows, stack = len(roles.contracting), len(roles.stack)
        split = stack + (rows if layout == "in,out" else len(roles.output))
        lead = w.shape[:stack]
        left = math.prod(w.shape[stack:split])
        matrix = w.reshape(*lead, left, math.prod(w.shape[split:]))
        u, values, v = jnp.linalg.svd(matrix, full_matrices=False)
        kept = jnp.maximum(values - by, 0)
        return ((u * kept[..., None, :]) @ v).reshape(w.shape)

    return _proximal(prox, weight, where)


def _shrunk(w: jax.Array, by: jax.Array, size: jax.Array) -> jax.Array:
    """``w`` shorter by ``by`` of its size, or 0."""
    left = jnp.maximum(size - by, 0)
    return jnp.where(left > 0, w * (left / jnp.where(size > 0, size, 1)), 0)


def _proximal(
    prox: Callable[[jax.Array, jax.Array], jax.Array], weight: Weight, where: Where
) -> optax.GradientTransformation:
    scale = weight if callable(weight) else lambda count: weight

    def init_fn(params: PyTree) -> ProximalState:
        fits(params, where)
        return ProximalState(jnp.zeros((), jnp.int32))

    def update_fn(updates: PyTree, state: PyTree, params: PyTree = None) -> PyTree:
        if params is None:
            raise ValueError("proximal steps need the params: tx.update(grads, state, params)")
        chosen, by = fits(params, where), jnp.asarray(scale(state.count), jnp.float32)
        values = dict(named_leaves(params))

        def step(path: str, u: Leaf) -> Leaf:
            if path not in chosen:
                return u
            w = values[path].astype(jnp.promote_types(values[path].dtype, jnp.float32))
            return (prox(w + u.astype(w.dtype), by) - w).astype(u.dtype)

        return map_named(step, updates), ProximalState(
            jnp.asarray(optax.safe_increment(state.count))
        )

    return optax.GradientTransformation(init_fn, update_fn)


__all__ = ["group_lasso", "l1", "nuclear"]
