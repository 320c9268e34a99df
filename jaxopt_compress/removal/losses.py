"""The loss without each unit."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_compress.removal.units import Member
from jaxopt_compress.tree import map_named
from jaxopt_compress.tree.paths import is_float


def losses(
    loss: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    members: Mapping[str, Iterable[Member]],
    at_once: int,
) -> dict[str, np.ndarray]:
    """Group -> the loss with each of its units masked, ``at_once`` of them mapped at a time."""
    whole = jax.eval_shape(loss, params, *args)
    if getattr(whole, "shape", None) != ():
        raise ValueError(f"loss has to return one number, and returns {whole}")

    @jax.jit
    def of_group(params: Any, args: tuple[Any, ...], at: dict[tuple[str, int], jax.Array]) -> Any:
        def of_unit(own: dict[tuple[str, int], jax.Array]) -> jax.Array:
            def masked(path: str, x: Any) -> Any:
                for (name, axis), indices in own.items():
                    if name == path and is_float(x):
                        x = jnp.asarray(x).at[(slice(None),) * axis + (indices,)].set(0)
                return x

            return loss(map_named(masked, params), *args)

        return lax.map(of_unit, at, batch_size=at_once)

    found = {}
    for name, own in members.items():
        at = {(m.path, m.axis): jnp.asarray(m.indices, jnp.int32) for m in own}
        found[name] = np.asarray(of_group(params, args, at))
    return found
