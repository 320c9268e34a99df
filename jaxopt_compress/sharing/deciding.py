"""Which values a parameter's entries share: found, and decided again."""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.compression import Decision, Parameter
from jaxopt_compress.compression.matrices import matrices_of
from jaxopt_compress.numerics.additive import nearest_sums, sums_of_centroids
from jaxopt_compress.numerics.clusters import kmeans, nearest
from jaxopt_compress.numerics.shared import Books
from jaxopt_compress.sharing.options import Options
from jaxopt_compress.sharing.state import SharedState, SumState, as_codes, dense


def begin_sharing(options: Options, parameter: Parameter) -> Decision:
    """Clusters, or placeholders of their shapes until ``begin``."""
    if options.begin == 0:
        return _clustered(options, parameter)
    shapes = jax.eval_shape(lambda: _clustered(options, parameter))
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return _activated(empty, jnp.zeros((), bool))


def share_again(
    options: Options, decision: Decision, count: jax.Array, parameter: Parameter
) -> Decision:
    """Clusters at ``begin``, and the nearest centroids ``every`` so many updates after it."""
    begin, every = options.begin, options.every
    if begin:
        decision = _activated(decision, count >= begin)
        fresh = lambda: _activated(_clustered(options, parameter), count >= begin)
        decision = lax.cond(count == begin, fresh, lambda: decision)
    if every is None:
        return decision
    again = (count > begin) & ((count - begin) % every == 0)
    return lax.cond(again, lambda: _reassigned(decision, parameter), lambda: decision)


def _activated(decision: Decision, active: jax.Array) -> Decision:
    return decision._replace(state=dataclasses.replace(decision.state, active=active))


def _clustered(options: Options, parameter: Parameter) -> Decision:
    """k-means of the values, and the nearest centroids; for sums, of the residual of each."""
    books, zero = options.books(parameter), options.pins(parameter)
    w, own = dense(parameter.value), None
    if options.key is not None:
        own = jax.random.fold_in(options.key, zlib.crc32(parameter.path.encode()))
    weight, keep = _importance(parameter)
    how = (options.clusters, options.init, options.iterations, options.codebooks)
    found = _found(w, weight, keep, own, books, zero, how)
    state = lambda codes, moves: SharedState(
        codes, None, books, options.clusters, zero, moves, options.held
    )
    if options.codebooks == 1:
        ((codes, centroids),) = found
        return Decision(state(codes, options.moves), {"centroids": centroids})
    parts = tuple(state(codes, False) for codes, _ in found)
    learned = {f"centroids{i}": centroids for i, (_, centroids) in enumerate(found)}
    return Decision(SumState(parts, None, options.moves), learned)


@functools.partial(jax.jit, static_argnames=("books", "zero", "how"))
def _found(
    w: jax.Array,
    weight: jax.Array,
    keep: jax.Array,
    key: Any,
    books: Books,
    zero: bool,
    how: tuple[int, str, int, int],
) -> list[tuple[jax.Array, jax.Array]]:
    """Codes and centroids of a parameter, for each codebook; compiled as one."""
    x = books.members(w.astype(jnp.float32))
    clusters, init, iterations, codebooks = how
    weight, kept = books.members(weight), books.members(keep)
    if codebooks == 1:
        weight, kept = (jnp.mean(a, -1, keepdims=True) for a in (weight, kept))
    # What met nothing counts a little, or it is left out of the range; all alike if nothing did.
    total = lambda a: jnp.sum(a, (1, 2), keepdims=True)
    mean = total(weight) / jnp.maximum(total(kept), 1e-30)
    weight = weight + kept * jnp.where(mean > 0, 1e-6 * mean, 1.0)
    if codebooks == 1:
        centroids = kmeans(x, weight[..., 0], clusters, init, key, zero, iterations)
        found = [_assigned(x, centroids, zero)]
    else:
        start = (clusters, codebooks, init, key, iterations)
        found = _marked_sums(x, *sums_of_centroids(x, weight, *start))
    place = lambda codes: as_codes(books.codes(codes, w.shape), clusters)
    return [(place(codes), books.centroids(c, w.shape)) for codes, c in found]


def _assigned(x: jax.Array, centroids: jax.Array, zero: bool) -> tuple[jax.Array, jax.Array]:
    """The nearest centroids; NaN in the codebooks of members that are NaN or infinite."""
    bad = jnp.any(~jnp.isfinite(x), (1, 2), keepdims=True)
    # The last one, since the first may be held at 0.
    codes = jnp.where(bad[..., 0], centroids.shape[1] - 1, nearest(x, centroids, zero))
    return codes, jnp.where(bad, jnp.nan, centroids)


def _marked_sums(
    x: jax.Array, codes: jax.Array, centroids: jax.Array
) -> list[tuple[jax.Array, jax.Array]]:
    """Codebook by codebook; NaN for members that are NaN or infinite, as in `_assigned`."""
    bad = jnp.any(~jnp.isfinite(x), (1, 2), keepdims=True)
    marked = jnp.where(bad[..., None], jnp.nan, centroids)
    return [(codes[:, i], marked[:, i]) for i in range(codes.shape[1])]


def _importance(parameter: Parameter) -> tuple[jax.Array, jax.Array]:
    """How much the error of an entry counts, and 1, or 0 under a mask: float32 of its shape."""
    shape = tuple(parameter.value.shape)
    weight = jnp.ones(shape, jnp.float32)
    stats = parameter.stats
    if stats is not None and stats.has("fisher"):
        weight = jnp.broadcast_to(stats.fisher.astype(jnp.float32), shape)
    elif stats is not None and stats.has("moments") and parameter.layout.contracting:
        moments = jnp.diagonal(stats.second_moment, axis1=-2, axis2=-1).astype(jnp.float32)
        weight = matrices_of(shape, parameter.layout, stats).per_input(moments)
    keep = jnp.ones(shape, jnp.float32)
    if parameter.keep is not None:
        keep = jnp.where(parameter.keep, keep, 0.0)
    return weight * keep, keep


def _reassigned(decision: Decision, parameter: Parameter) -> Decision:
    """The nearest of the present centroids for each vector, or the nearest sum of some."""
    state, learned = decision
    several = isinstance(state, SumState)
    parts = state.parts if several else (state,)
    own = [state.own(learned, i) for i in range(len(parts))] if several else [learned]
    w, (books, clusters) = dense(parameter.value), (parts[0].books, parts[0].clusters)
    x = books.members(w.astype(jnp.float32))
    held = [
        _per_book(part.centroids(c).astype(jnp.float32), books, clusters)
        for part, c in zip(parts, own, strict=True)
    ]
    if several:
        centroids = jnp.stack(held, 1)
        weight = books.members(_importance(parameter)[0])
        found = _marked_sums(x, nearest_sums(x, weight, centroids), centroids)
    else:
        found = [_assigned(x, held[0], parts[0].zero)]
    # In centroids, which are trained, nothing changes but what is marked.
    marks = [jnp.isnan(books.centroids(c, w.shape)) for _, c in found]
    kept = dict(zip(learned, marks, strict=True))
    learned = {name: jnp.where(kept[name], jnp.nan, c) for name, c in learned.items()}
    codes = [as_codes(books.codes(c, w.shape), clusters) for c, _ in found]
    new = tuple(dataclasses.replace(p, codes=c) for p, c in zip(parts, codes, strict=True))
    return Decision(dataclasses.replace(state, parts=new) if several else new[0], learned)


def _per_book(centroids: jax.Array, books: Books, clusters: int) -> jax.Array:
    """Inverts `Books.centroids`."""
    last = jnp.moveaxis(centroids, centroids.ndim + books.axis, -1)
    return last.reshape(-1, clusters, books.vector)
