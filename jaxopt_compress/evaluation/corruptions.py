"""Corruptions of inputs, for figures of robustness: ``corruption(key, x) -> x``.

`evaluate` and `compare` take them by name, and measure every metric under each of them too:

    >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
    >>> batches = [(jnp.eye(4) * 3, jnp.arange(4))]
    >>> under = {"noise": jc.corruptions.noise(0.1), "gaps": jc.corruptions.dropout(1.0)}
    >>> key = jax.random.key(0)
    >>> jc.evaluate(lambda p, x: x, {}, batches, ["accuracy"], corruptions=under, key=key)
    {'accuracy': 1.0, 'noise/accuracy': 1.0, 'gaps/accuracy': 0.25}

Floating inputs are corrupted, and images of bytes (uint8), whose values are rounded and clipped.
Other integers, such as tokens, stay as they are.
"""

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.typing import Leaf, PyTree

__all__ = ["Corruption", "blur", "dropout", "noise"]

Corruption = Callable[[jax.Array, jax.Array], jax.Array]
Corruptions = Mapping[str, Corruption]


@functools.cache
def noise(scale: float) -> Corruption:
    """Adds normal noise.

    Args:
        scale: Its standard deviation, in the units of the input: of bytes, up to 255.

    References:
        Hendrycks and Dietterich, 2019, Benchmarking Neural Network Robustness to Common
        Corruptions and Perturbations.
    """
    if not scale >= 0:
        raise ValueError(f"noise({scale}); a standard deviation is at least 0")
    return lambda key, x: x + scale * jax.random.normal(key, x.shape, x.dtype)


@functools.cache
def blur(sigma: float, axes: tuple[int, ...] = (1, 2)) -> Corruption:
    """Convolves with a normal density, cut off at four standard deviations; edges are repeated.

    Args:
        sigma: Its standard deviation in pixels.
        axes: The axes of the input along which it runs; by default those of images ``[n, height,
            width]`` and ``[n, height, width, channels]``.
    """
    if not sigma > 0:
        raise ValueError(f"blur({sigma}); a standard deviation is above 0")

    def run(key: jax.Array, x: jax.Array) -> jax.Array:
        del key
        for axis in axes:
            if not -x.ndim <= axis < x.ndim:
                raise ValueError(f"blur along axes {axes} of an input of shape {tuple(x.shape)}")
            across = jnp.moveaxis(x, axis, -1)
            weights = jnp.asarray(_smoothing(x.shape[axis], sigma), x.dtype)
            x = jnp.moveaxis(jnp.matmul(across, weights, precision="highest"), -1, axis)
        return x

    return run


@functools.cache
def dropout(share: float) -> Corruption:
    """Sets entries to 0, each with the same probability; others stay as they are.

    Args:
        share: The probability.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"dropout({share}); a share is between 0 and 1")
    return lambda key, x: jnp.where(jax.random.bernoulli(key, share, x.shape), 0, x)


def check_corruptions(corruptions: Corruptions | None, key: jax.Array | None) -> Corruptions:
    """The corruptions, or none.

    Raises:
        ValueError: There are some, and no random key; or a name has a slash.
    """
    for name in corruptions or {}:
        if "/" in name:
            raise ValueError(f"the corruption {name!r}: a slash stands before names of figures")
    if corruptions and key is None:
        raise ValueError("corruptions= needs a random key=, such as jax.random.key(0)")
    return corruptions or {}


def versions(
    inputs: tuple[PyTree, ...], corruptions: Corruptions, key: Any, batch: int
) -> Iterator[tuple[str, tuple[PyTree, ...]]]:
    """The inputs as they are, and under each corruption, with a prefix for names of figures.

    Args:
        inputs: The inputs of one batch.
        corruptions: By name.
        key: Random; each batch and each name has one of its own.
        batch: Which one it is.

    Raises:
        ValueError: Nothing in the inputs can be corrupted.
    """
    yield "", inputs
    for name, corruption in corruptions.items():
        own = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), batch)
        leaves, treedef = jax.tree.flatten(inputs)
        keys = jax.random.split(own, len(leaves))
        pairs = zip(keys, leaves, strict=True)
        new = [_corrupted(corruption, k, x) if is_signal(x) else x for k, x in pairs]
        if not any(map(is_signal, leaves)):
            found = ", ".join(str(getattr(x, "dtype", type(x).__name__)) for x in leaves)
            raise ValueError(
                f"the corruption {name!r} needs floating inputs, or bytes (uint8); here are {found}"
            )
        yield f"{name}/", jax.tree.unflatten(treedef, new)


def is_signal(x: Leaf) -> bool:
    """Whether an input is floating, or an image of bytes."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and (dtype == np.uint8 or jnp.issubdtype(dtype, jnp.floating))


@functools.partial(jax.jit, static_argnums=0)
def _corrupted(corruption: Corruption, key: jax.Array, x: jax.Array) -> jax.Array:
    if x.dtype != np.uint8:
        return corruption(key, x).astype(x.dtype)
    wide = corruption(key, x.astype(jnp.float32))
    return jnp.clip(jnp.round(wide), 0, 255).astype(x.dtype)


def _smoothing(length: int, sigma: float) -> np.ndarray:
    """``[length, length]``: each column the weights of one result."""
    radius = int(4 * sigma + 0.5)
    density = [math.exp(-(d * d) / (2 * sigma * sigma)) for d in range(-radius, radius + 1)]
    matrix = np.zeros((length, length))
    for d, weight in zip(range(-radius, radius + 1), density, strict=True):
        at = np.arange(length)
        np.add.at(matrix, (np.clip(at + d, 0, length - 1), at), weight / sum(density))
    return matrix
