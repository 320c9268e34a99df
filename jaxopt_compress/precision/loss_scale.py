"""Dynamic loss scaling as an optax transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_compress.typing import Leaf, PyTree


class LossScaleState(NamedTuple):
    """The state of `dynamic_loss_scale`.

    Attributes:
        scale: Float32: what to multiply the loss by.
        finite_steps: int32: steps since the scale was changed, all of them finite.
        skipped: int32: steps that were not taken.
        inner: The state of the inner transformation.
    """

    scale: jax.Array
    finite_steps: jax.Array
    skipped: jax.Array
    inner: Any


def dynamic_loss_scale(
    inner: optax.GradientTransformation,
    initial: float = 2.0**15,
    growth: float = 2.0,
    backoff: float = 0.5,
    period: int = 2000,
) -> optax.GradientTransformationExtraArgs:
    """Divides gradients of a scaled loss by the scale, and leaves out steps that overflow.

    Gradients in float16 below 6e-8 are lost, those above 65504 are infinite. The scale grows after
    ``period`` finite steps; a step with an infinity or a NaN is not taken, and shrinks it: neither
    parameters nor the inner state change. Bfloat16 has the range of float32 and needs no scale.

    Args:
        inner: Any optax transformation; it sees float32 gradients.
        initial: The first scale.
        growth: What it is multiplied by after ``period`` finite steps.
        backoff: What it is multiplied by after a step that overflows; it stays at least 1.
        period: In steps.

    Returns:
        An optax transformation. Multiply the loss by ``loss_scale(opt_state)``.

    Raises:
        ValueError: ``growth`` below 1, or ``backoff`` that is not between 0 and 1.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxopt_compress as jc
        >>> params = {"w": jnp.ones(3)}
        >>> tx = jc.dynamic_loss_scale(optax.sgd(1.0), initial=1024.0)
        >>> opt_state = tx.init(params)
        >>> def loss(params, scale):  # gradients of 1e-8 are none in float16
        ...     return scale * jnp.sum(params["w"].astype(jnp.float16) * jnp.float16(1e-7))
        >>> grads = jax.grad(loss)(params, jc.loss_scale(opt_state).astype(jnp.float16))
        >>> updates, opt_state = tx.update(grads, opt_state, params)
        >>> bool(jnp.allclose(updates["w"], -1e-7, rtol=0.2))
        True

    References:
        Micikevicius et al., 2018, Mixed Precision Training.
    """
    if growth < 1 or not 0 < backoff < 1:
        raise ValueError(f"growth={growth!r} is at least 1 and backoff={backoff!r} within 0 and 1")
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> LossScaleState:
        zero = jnp.zeros((), jnp.int32)
        return LossScaleState(jnp.float32(initial), zero, zero, inner.init(params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> PyTree:
        true_size = lambda g: g.astype(jnp.float32) / state.scale if _is_float(g) else g
        grads = jax.tree.map(true_size, updates)
        each = [jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads) if _is_float(g)]
        finite = jnp.all(jnp.asarray(each, bool))
        updates, new = inner.update(grads, state.inner, params, **extra)
        if params is not None:
            same = lambda u, p: u.astype(p.dtype) if _is_float(u) and _is_float(p) else u
            updates = jax.tree.map(same, updates, params)
        updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state.inner)
        steps = state.finite_steps + 1
        grown = jnp.where(steps >= period, state.scale * growth, state.scale)
        grown = jnp.where(jnp.isfinite(grown), grown, state.scale)
        scale = jnp.where(finite, grown, jnp.maximum(state.scale * backoff, 1.0))
        steps = jnp.where(finite & (steps < period), steps, 0)
        skipped = jnp.where(finite, state.skipped, state.skipped + 1)
        return updates, LossScaleState(scale, steps, skipped, new)

    return optax.GradientTransformationExtraArgs(init, update)


def loss_scale(opt_state: PyTree) -> jax.Array:
    """The present scale in the state of an optimizer.

    Args:
        opt_state: The state of `dynamic_loss_scale`, or of a transformation around it.

    Returns:
        Float32, a scalar.

    Raises:
        ValueError: There is none in it, or several.
    """
    is_one = lambda x: isinstance(x, LossScaleState)
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_one) if is_one(x)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} states of dynamic_loss_scale in the optimizer's state")
    return found[0].scale


def _is_float(x: Leaf) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
