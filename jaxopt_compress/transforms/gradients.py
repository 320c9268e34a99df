"""Gradients at a view: as those of one for lifted functions, and as those of parameters."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import FakeQuantizedArray, InputQuantizedArray, map_factors
from jaxopt_compress.arrays.base import is_compressed
from jaxopt_compress.tree import map_named, named_leaves
from jaxopt_compress.typing import Leaf, PyTree


def weight_gradients(grads: PyTree) -> PyTree:
    """Gradients at a view for lifted functions, as one array per parameter.

    Other views have the structure of the parameters, and so have their gradients. With
    ``activations=`` or ``backward=`` leaves hold more, and a wrapper that compares gradients with
    parameters needs this first, such as `optax.MultiSteps`, `optax.apply_if_finite` and `optax.ema`
    around or before `compressed_training`, which takes gradients of either form.

    Args:
        grads: What `jax.grad` of a loss found at ``compression.view(params, opt_state)``.

    Returns:
        The same gradients of weights, one array per parameter. Those of learned steps of
        activations have no place in it, and ``update`` refuses to train without
        them: add up whole gradients over batches instead.

    Raises:
        TypeError: A parameter is seen as factors that round activations; names it.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxopt_compress as jc
        >>> c = jc.quantize("int8", activations="int8")
        >>> tx = optax.MultiSteps(jc.compressed_training(optax.sgd(0.1), c), 2)
        >>> params = {"w": jnp.ones((4, 2))}
        >>> opt_state = tx.init(params)
        >>> loss = jc.lift(lambda params, x: jnp.sum((x @ params["w"]) ** 2))
        >>> grads = jax.grad(loss)(c.view(params, opt_state), jnp.ones((1, 4)))
        >>> grads = jc.weight_gradients(grads)
        >>> updates, opt_state = tx.update(grads, opt_state, params)
        >>> grads["w"].shape, updates["w"].shape
        ((4, 2), (4, 2))
    """

    def values(path: str, g: Leaf) -> Leaf:
        weight = _value_of(g)
        if is_compressed(weight):
            raise TypeError(
                f"the gradient of {path!r} is a {type(weight).__name__}: its factors learn, and "
                "there is no gradient of the parameter; add up gradients of the view instead"
            )
        return weight

    return map_named(values, grads)


def gradients_of_values(grads: PyTree) -> PyTree:
    """Gradients of weights and factors at a view, as far as there are any.

    Args:
        grads: Gradients at the view, or of the form of `weight_gradients`.
    """
    return map_named(lambda path, g: map_factors(lambda _, x: _value_of(x), path, g), grads)


def _value_of(g: Leaf) -> Leaf:
    """The gradient of the weight inside of a form that rounds activations too."""
    weight = g.weight if isinstance(g, InputQuantizedArray) else g
    return weight.form.codes if isinstance(weight, FakeQuantizedArray) else weight


def at_view(grads: PyTree, seen: PyTree, parts: list[dict[str, Any]]) -> PyTree:
    """Gradients of parameters as gradients at what they are seen as, if they are not that already.

    Args:
        grads: Gradients of either form.
        seen: The view.
        parts: The learned parts of the compressions.

    Raises:
        ValueError: The gradient of a learned step is missing; names the parameter.
    """
    of_inputs = lambda x: isinstance(x, dict) and "input" in x
    learned = {path for part in parts for path, x in part.items() if of_inputs(x)}
    views = dict(named_leaves(seen))

    def whole(path: str, g: Leaf) -> Leaf:
        s = views.get(path)
        if g is None or is_compressed(g) or not isinstance(s, InputQuantizedArray):
            return g
        if path in learned:
            raise ValueError(
                f"the gradient of {path!r} is that of its weight alone, and its activations have a "
                "learned step: pass the gradients at compression.view(params, opt_state) as they "
                "are. Wrappers that keep gradients, as optax.MultiSteps does, keep those of "
                "weights alone: add up whole ones over batches, and update once"
            )
        nothing = jax.tree.map(jnp.zeros_like, s)
        form = nothing.weight.form.replace(codes=g)
        return nothing.replace(weight=nothing.weight.replace(form=form))

    return map_named(whole, grads)
