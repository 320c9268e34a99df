"""What a way of averaging over devices is, and the collectives that it is made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax

AxisName = str | tuple[str, ...]
Shape = tuple[int, ...]


class Reduction(NamedTuple):
    """A way of averaging one parameter's gradients over devices that loses something.

    A method sees each gradient as matrices ``[layers, k, n]`` in float32, so that no scale,
    factor or choice is shared by the layers of a stack. It says which share of the average is this
    device's: the mean of all devices' shares has to be the average that it returns. What is missing
    from the share is kept and added to the next gradient (error feedback), so nothing is lost.

    Attributes:
        name: As it is called by users.
        takes: ``takes([layers, k, n]) -> bool``: whether fewer bytes are sent than by a plain sum.
        init: ``init([layers, k, n], key) -> shared``: what all devices remember alike; or None.
        mean: ``mean(m, shared, axis_name) -> (average, share, shared)``.
    """

    name: str
    takes: Callable[[Shape], bool]
    init: Callable[[Shape, jax.Array], Any]
    mean: Callable[[jax.Array, Any, AxisName], tuple[jax.Array, jax.Array, Any]]


def gather(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """``[devices, *x.shape]``, known to be the same on all devices where JAX checks that."""
    to = "invarying" if varies(x, axis_name) else "varying"
    return lax.all_gather(x, axis_name, to=to)


def varies(x: jax.Array, axis_name: AxisName) -> bool:
    """Whether JAX checks what differs between devices, and takes ``x`` for something that does."""
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    return bool(names & jax.typeof(x).manual_axis_type.varying)


def is_checked(axis_name: AxisName) -> bool:
    """Whether JAX checks what differs between devices: `jax.shard_map` with ``check_vma=True``."""
    return varies(lax.axis_index(axis_name), axis_name)
