"""Sums of the largest entries."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.parallel.reduction import AxisName, Reduction, gather


def top_k(fraction: float = 0.01) -> Reduction:
    r"""Averages the largest entries of each device: an all-gather of values and places.

    Every layer sends its ``k = ceil(fraction * size)`` entries of largest magnitude, 8 bytes each;
    devices may choose different ones. All receive ``8 k D`` bytes, which grows with the number of
    devices :math:`D`: with many of them `power_sgd` or `blockwise` cost less. Among equal entries
    the first ones go.

    Args:
        fraction: The share of each layer's entries, above 0 and at most 1.

    Returns:
        A method for `reduced_gradients`.

    Raises:
        ValueError: ``fraction`` lies outside of (0, 1].

    Example:
        >>> import jaxopt_compress as jc
        >>> tx = jc.reduced_gradients(jc.top_k(0.01), axis_name="data")

    References:
        Aji and Heafield, 2017, Sparse Communication for Distributed Gradient Descent. Stich et al.,
        2018, Sparsified SGD with Memory.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction!r}; it lies above 0 and is at most 1")

    def mean(m: jax.Array, shared: None, axis_name: AxisName) -> tuple[jax.Array, jax.Array, None]:
        flat = m.reshape(m.shape[0], -1)
        _, places = lax.top_k(jnp.abs(flat), math.ceil(fraction * flat.shape[1]))
        values = jnp.take_along_axis(flat, places, 1)
        layers = jnp.arange(len(flat))[:, None]
        share = jnp.zeros_like(flat).at[layers, places].set(values)
        devices = lax.axis_size(axis_name)
        all_values, all_places = gather(values, axis_name), gather(places, axis_name)
        # No fresh array of zeros may be made from what differs between devices.
        average = jnp.zeros(flat.shape, flat.dtype).at[layers, all_places].add(all_values / devices)
        return average.reshape(m.shape), share.reshape(m.shape), None

    takes = lambda shape: math.prod(shape) > 0
    return Reduction(f"top_k({fraction})", takes, lambda shape, key: None, mean)
