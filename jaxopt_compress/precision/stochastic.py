"""Parameters in 16 bits that small updates still move, by stochastic rounding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxopt_compress.numerics.noise import noise_of
from jaxopt_compress.typing import Leaf, PyTree


class StochasticRoundingState(NamedTuple):
    """The state of `stochastic_rounding`.

    Attributes:
        count: int32: steps taken, which the noise depends on.
        inner: The state of the inner optimizer.
    """

    count: jax.Array
    inner: PyTree


def stochastic_rounding(
    inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rounds updates so that bfloat16 parameters keep the expected value of ``params + updates``.

    An update of less than half a step of bfloat16, 0.2 to 0.4% of a parameter, is lost where sums
    are rounded to the nearest. Here the sum is rounded up or down, with probabilities that make its
    expected value right, so no float32 copy of the parameters is needed. Parameters of other types
    get their updates as they are.

    optax gives averages the type of parameters, and second moments in bfloat16 stand still. An
    inner optimizer sees gradients and parameters in float32, and keeps its state so.

    Args:
        inner: Any optax optimizer, also `small_states` of one. Without it this is a transformation
            that stands last in a chain, where those before it should compute in float32.

    Returns:
        An optax transformation; `optax.apply_updates` adds its updates without further rounding.

    Example:
        >>> import jax.numpy as jnp, optax, jaxopt_compress as jc
        >>> params = jnp.ones(10000, jnp.bfloat16)
        >>> tx = jc.stochastic_rounding(optax.sgd(1.0))
        >>> updates, _ = tx.update(jnp.full(10000, -1e-3), tx.init(params), params)
        >>> moved = optax.apply_updates(params, updates)
        >>> round(float(moved.astype(jnp.float32).mean()), 3), sorted(set(moved.tolist()))
        (1.001, [1.0, 1.0078125])

    References:
        Zamirai et al., 2020, Revisiting BFloat16 Training.
    """
    own = optax.with_extra_args_support(optax.identity() if inner is None else inner)
    widened = (lambda tree: tree) if inner is None else _in_float32

    def init(params: PyTree) -> StochasticRoundingState:
        return StochasticRoundingState(jnp.zeros((), jnp.int32), own.init(widened(params)))

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> PyTree:
        if params is None:
            raise ValueError("stochastic_rounding needs params, which updates are added to")
        updates, new = own.update(widened(updates), state.inner, widened(params), **extra)

        def rounded(u: Leaf, p: Leaf) -> Leaf:
            if u is None or getattr(p, "dtype", None) != jnp.bfloat16:
                return u
            wide = p.astype(jnp.float32)
            target = wide + u.astype(jnp.float32)
            # The difference of neighbours is exact in float32.
            return _to_bfloat16(target, state.count).astype(jnp.float32) - wide

        updates = jax.tree.map(rounded, updates, params, is_leaf=lambda x: x is None)
        count = jnp.where(state.count < 2**31 - 1, state.count + 1, state.count)
        return updates, StochasticRoundingState(count, new)

    return optax.GradientTransformationExtraArgs(init, update)


def _in_float32(tree: PyTree) -> Any:
    """What is in bfloat16; the rest as it is."""
    short = lambda x: getattr(x, "dtype", None) == jnp.bfloat16
    return jax.tree.map(lambda x: x.astype(jnp.float32) if short(x) else x, tree)


def _to_bfloat16(x: jax.Array, salt: jax.Array) -> jax.Array:
    """Adds noise below the bits that bfloat16 keeps, and cuts the rest off."""
    noise = (noise_of(x, salt) * 2.0**16).astype(jnp.uint32)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    cut = lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    # Noise would turn a number that is not finite into another one.
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)
