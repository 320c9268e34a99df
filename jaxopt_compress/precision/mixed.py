"""A function that computes in another floating type than its parameters are kept in."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.tree import Where, map_named, select
from jaxopt_compress.typing import Leaf, PyTree


def mixed_precision(
    fn: Callable[..., PyTree],
    compute: Any = jnp.bfloat16,
    output: Any = jnp.float32,
    *,
    keep: Where = None,
) -> Callable[..., Any]:
    """Runs ``fn(params, *args, **kwargs)`` in a shorter floating type.

    Floating arrays among the arguments are converted to ``compute``, and floating results to
    ``output``. Parameters stay as they are outside: `jax.grad` of the result gives gradients of
    their type, so that an optimizer keeps its precision. Compressed parameters are not converted;
    they meet activations in the type of those. Whatever the function itself converts stays so, such
    as a softmax in float32.

    Args:
        fn: Any JAX function.
        compute: The type of the computation.
        output: The type of the results; None leaves them as they are.
        keep: Parameters that are not converted, by path, such as ``"**/norm/*"``.

    Returns:
        A function of the same arguments.

    Raises:
        ValueError: In a call: ``keep`` matches no parameter.
        TypeError: A type that is not floating.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> seen = []
        >>> def loss(params, x):
        ...     seen.append((x.dtype.name, params["scale"].dtype.name))
        ...     return jnp.sum(jnp.tanh(x @ params["w"]) * params["scale"])
        >>> fast = jc.mixed_precision(loss, "bfloat16", keep="scale")
        >>> params = {"w": jnp.ones((4, 2)), "scale": jnp.ones(2)}
        >>> jax.grad(fast)(params, jnp.ones((3, 4)))["w"].dtype.name, seen
        ('float32', [('bfloat16', 'float32')])

    References:
        Micikevicius et al., 2018, Mixed Precision Training.
    """
    compute, output = (None if t is None else jnp.dtype(t) for t in (compute, output))
    for kind in (compute, output):
        if kind is not None and not jnp.issubdtype(kind, jnp.floating):
            raise TypeError(f"mixed_precision computes in floating types, and got {kind}")

    @functools.wraps(fn)
    def run(params: PyTree, *args: PyTree, **kwargs: Any) -> PyTree:
        kept = set() if keep is None else set(select(params, keep, "keep"))
        params = map_named(lambda p, x: x if p in kept else _cast(x, compute), params)
        args, kwargs = jax.tree.map(
            lambda x: _cast(x, compute), (args, kwargs), is_leaf=is_compressed
        )
        results = fn(params, *args, **kwargs)
        return jax.tree.map(lambda x: _cast(x, output), results, is_leaf=is_compressed)

    return run


def _cast(x: Leaf, dtype: DTypeLike) -> Leaf:
    """A floating array in another type; all else as it is."""
    if dtype is None or is_compressed(x) or not hasattr(x, "astype"):
        return x
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
