"""The loss without each unit."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_compress.removal.units import Member
from jaxopt_compress.tree import map_named
from jaxopt_compress.tree.paths import is_float
from jaxopt_compress.typing import Leaf, PyTree


def losses(
    loss: Callable[..., jax.Array],
    params: PyTree,
    args: tuple[PyTree, ...],
    members: Mapping[str, Iterable[Member]],
    at_once: int,
) -> dict[str, np.ndarray]:
    """Group -> the loss with each of its units masked, ``at_once`` of them mapped at a time."""
    _check_loss(loss, params, args)

    @jax.jit
    def of_group(
        params: PyTree, args: tuple[PyTree, ...], at: dict[tuple[str, int], jax.Array]
    ) -> jax.Array:
        def of_unit(own: dict[tuple[str, int], jax.Array]) -> jax.Array:
            def masked(path: str, x: Leaf) -> Leaf:
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


def losses_of_blocks(
    loss: Callable[..., jax.Array],
    params: PyTree,
    args: tuple[PyTree, ...],
    blocks: Sequence[Sequence[str]],
) -> np.ndarray:
    """The loss with the parameters of each block 0, one block after the other."""
    _check_loss(loss, params, args)
    paths = sorted({path for own in blocks for path in own})

    @jax.jit
    def of_block(params: PyTree, args: tuple[PyTree, ...], stays: jax.Array) -> jax.Array:
        masked = lambda path, x: (
            x * stays[paths.index(path)].astype(x.dtype) if path in paths else x
        )
        return loss(map_named(masked, params), *args)

    stays = [[float(path not in own) for path in paths] for own in blocks]
    return np.array([of_block(params, args, jnp.array(row)) for row in stays])


def _check_loss(loss: Callable[..., jax.Array], params: PyTree, args: tuple[PyTree, ...]) -> None:
    whole = jax.eval_shape(loss, params, *args)
    if getattr(whole, "shape", None) != ():
        raise ValueError(f"loss has to return one number, and returns {whole}")
