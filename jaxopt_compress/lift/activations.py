"""The rows of an activation that meet the contracted axes of a parameter."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.lift.interpreter import Call


def rows_of(x: jax.Array, batch: Sequence[int], summed: Sequence[int]) -> jax.Array:
    """``[*batch, rows, *summed]`` of an activation."""
    rest = [d for d in range(x.ndim) if d not in batch and d not in summed]
    rows = math.prod(x.shape[d] for d in rest)
    x = x.transpose(*batch, *rest, *summed)
    lead, tail = x.shape[: len(batch)], x.shape[x.ndim - len(summed) :]
    return x.reshape(*lead, rows, *tail)


def rows_of_groups(x: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``[groups, rows, k]`` of consecutive groups of rows, and which rows belong to which group."""
    ends = jnp.cumsum(sizes)[:, None]
    row = jnp.arange(x.shape[0])
    belongs = (row >= ends - sizes[:, None]) & (row < ends)
    return jnp.broadcast_to(x, (sizes.shape[0], *x.shape)), belongs


def patches_of(call: Call, x: jax.Array, kernel: tuple[int, ...]) -> jax.Array:
    """A convolution's input as ``[groups, rows, *contracting axes of the kernel, in order]``."""
    params, spec = call.params, call.params["dimension_numbers"]
    groups = params["feature_group_count"]
    window = [kernel[d] for d in spec.rhs_spec[2:]]
    patches = lax.conv_general_dilated_patches(
        x,
        window,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        dimension_numbers=spec,
    )
    # The patch axis is [channels, *window]; the channels fall into groups.
    patches = jnp.moveaxis(patches, spec.out_spec[1], -1)
    channels = kernel[spec.rhs_spec[1]]
    patches = patches.reshape(-1, groups, channels, *window)
    named = (spec.rhs_spec[1], *spec.rhs_spec[2:])
    order = sorted(range(len(named)), key=named.__getitem__)
    return patches.transpose(1, 0, *(2 + i for i in order))
