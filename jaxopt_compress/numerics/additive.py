"""Vectors as sums of centroids, one of each of several codebooks."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.numerics.clusters import kmeans, magnitudes, nearest

# Sums that a search follows for each vector, and distances that are there at a time.
_BEAM, _DISTANCES = 4, 2**22
# How often centroids and codes are improved in turn.
_ROUNDS = 4


def sums_of_centroids(
    x: jax.Array,
    weight: jax.Array,
    clusters: int,
    codebooks: int,
    init: str = "density",
    key: jax.Array | None = None,
    iterations: int = 50,
) -> tuple[jax.Array, jax.Array]:
    r"""Codes and centroids of a small :math:`\sum_{ij} h_{ij} (x_i - \sum_m c_{m, a_m(i)})_j^2`.

    Codebooks start as k-means of the residual of the ones before (residual quantization). Then they
    are improved in turn with codes, as long as this lowers the error. The centroids of a codebook
    become weighted means of the residuals without it, one codebook after the other; codes are
    found by a beam search.

    Args:
        x: ``[books, members, vector]``, float32; each book is a problem of its own.
        weight: An array of that shape, or that of ``x`` but for a last axis of size 1; at least 0.
        clusters: Centroids per codebook.
        codebooks: Centroids that are added for a vector.
        init: As in `kmeans`.
        key: As in `kmeans`.
        iterations: The most iterations of k-means.

    Returns:
        int32 codes ``[books, codebooks, members]`` and centroids
        ``[books, codebooks, clusters, vector]``.

    References:
        Chen et al., 2010, Approximate Nearest Neighbor Search by Residual Vector Quantization.
        Babenko and Lempitsky, 2014, Additive Quantization for Extreme Vector Compression.
    """
    books, members, vector = x.shape
    if not members or not books:
        shape = (books, codebooks, clusters, vector)
        return jnp.zeros((books, codebooks, members), jnp.int32), jnp.zeros(shape)
    top = magnitudes(x)
    x = x * (1 / top)
    weight = weight / jnp.maximum(jnp.max(weight, (1, 2), keepdims=True), 2.0**-125)
    rest, found = x, []
    keys = [None] * codebooks if key is None else list(jax.random.split(key, codebooks))
    for own in keys:
        c = kmeans(rest, jnp.mean(weight, -1), clusters, init, own, False, iterations)
        at = nearest(rest, c)[..., None]
        rest = rest - jnp.take_along_axis(c, at, 1)
        found.append(c)
    centroids = jnp.stack(found, 1)
    weight = jnp.broadcast_to(weight, x.shape)
    error = lambda codes, c: jnp.sum(weight * (x - jax.vmap(_sums)(codes, c)) ** 2, (1, 2))

    def improved(_: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        codes, c, best = now
        c_new = jax.vmap(_means)(x, weight, codes, c)
        codes_new = nearest_sums(x, weight, c_new)
        lost = error(codes_new, c_new)
        better = lost < best
        pick = lambda new, old: jnp.where(better.reshape(-1, *[1] * (old.ndim - 1)), new, old)
        return pick(codes_new, codes), pick(c_new, c), pick(lost, best)

    codes = nearest_sums(x, weight, centroids)
    start = (codes, centroids, error(codes, centroids))
    codes, centroids, _ = lax.fori_loop(0, _ROUNDS, improved, start)
    return codes, centroids * top[..., None]


def nearest_sums(x: jax.Array, weight: jax.Array, centroids: jax.Array) -> jax.Array:
    """Which centroids, one per codebook, have about the nearest sum, by a beam search.

    Args:
        x: ``[books, members, vector]``, float32.
        weight: An array of that shape.
        centroids: ``[books, codebooks, clusters, vector]``, float32.

    Returns:
        int32 ``[books, codebooks, members]``.
    """
    size = max(1, _DISTANCES // (_BEAM * centroids.shape[2]))
    scale = jnp.ones((len(x), 1, 1))
    if x.size:
        # The larger of both: squares of the centroids of a book of zeros would be infinite.
        every = centroids.reshape(len(x), -1, x.shape[-1])
        scale = 1 / jnp.maximum(magnitudes(x), magnitudes(every))
    x, centroids = x * scale, centroids * scale[..., None]

    def book(x: jax.Array, weight: jax.Array, c: jax.Array) -> jax.Array:
        one = lambda member: _beam(member[0], member[1], c)
        if len(x) <= size:
            return jax.vmap(lambda a, b: one((a, b)))(x, weight).T
        return lax.map(one, (x, weight), batch_size=size).T

    return jax.vmap(book)(x, weight, centroids)


def _beam(x: jax.Array, weight: jax.Array, centroids: jax.Array) -> jax.Array:
    """Codes ``[codebooks]`` of a vector ``[vector]``."""
    rest, codes = x[None], jnp.zeros((1, 0), jnp.int32)
    for c in centroids:
        # The square of a residual is the same for all codes, but not for all of the beam.
        dots = jnp.matmul(rest * weight, c.T, precision="highest")
        base = jnp.sum(weight * rest * rest, -1, keepdims=True)
        lost = base - 2 * dots + jnp.sum(weight * c * c, -1)
        at = _least(lost.reshape(-1), min(_BEAM, lost.size))
        beam, code = at // len(c), at % len(c)
        rest = rest[beam] - c[code]
        codes = jnp.concatenate([codes[beam], code[:, None]], -1)
    return codes[0]


def _least(x: jax.Array, count: int) -> jax.Array:
    """Where the least numbers are; `lax.top_k` sorts them all."""
    found = []
    for _ in range(count):
        at = jnp.argmin(x).astype(jnp.int32)
        found.append(at)
        x = jnp.where(jnp.arange(x.size) == at, jnp.inf, x)
    return jnp.stack(found)


def _sums(codes: jax.Array, centroids: jax.Array) -> jax.Array:
    """Sums ``[members, vector]`` by codes ``[codebooks, members]``."""
    return functools.reduce(jnp.add, [c[at] for at, c in zip(codes, centroids, strict=True)])


def _means(x: jax.Array, weight: jax.Array, codes: jax.Array, centroids: jax.Array) -> jax.Array:
    """Each codebook in turn: weighted means of the residual of the others."""
    new = list(centroids)
    rest = x - _sums(codes, centroids)
    for i, at in enumerate(codes):
        own = rest + new[i][at]
        sums = lambda y, at=at: jax.ops.segment_sum(y, at, centroids.shape[1])
        there = sums(weight)
        means = sums(weight * own) / jnp.where(there > 0, there, 1)
        new[i] = jnp.where(there > 0, means, new[i])
        rest = own - new[i][at]
    return jnp.stack(new)
