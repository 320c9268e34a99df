"""Weight sharing: entries take one of a few values, which training moves."""

import dataclasses
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.arrays import MaskedArray, SparseArray, is_compressed
from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    Parameter,
    compression_of,
    spelled,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.compression.matrices import matrices_of
from jaxopt_compress.numerics.clusters import INITS, kmeans, nearest
from jaxopt_compress.numerics.shared import Books
from jaxopt_compress.sharing.state import SharedState, as_codes, dense
from jaxopt_compress.tree import Layout, Where

_ELSEWHERE = {
    **dict.fromkeys(("k", "n_clusters", "num_clusters", "number_of_clusters"), "write clusters="),
    **dict.fromkeys(("bits", "nbits", "n_bits"), "write clusters=2**bits"),
    **dict.fromkeys(
        ("cluster_centroids_init", "centroid_init", "initialization"),
        "write init='linear', 'density', 'kmeans++' or 'random'",
    ),
    **dict.fromkeys(
        ("d", "block_size", "subvector", "num_subquantizers"), "write vector=, entries per code"
    ),
    **dict.fromkeys(("cluster_per_channel", "per_channel"), "write per='channel'"),
    **dict.fromkeys(("seed", "rng"), "write key=jax.random.key(seed)"),
}


@answers(_ELSEWHERE)
def share(
    clusters: int = 16,
    init: str = "linear",
    group_size: int | None = None,
    vector: int = 1,
    where: Where = None,
    *,
    per: str = "tensor",
    stack: int = 0,
    zero: bool | None = None,
    key: jax.Array | None = None,
    iterations: int = 50,
    centroid_dtype: str = "float32",
    begin: int = 0,
    every: int | None = None,
) -> Compression:
    r"""Gives entries one of a few values, found by k-means and trained.

    .. math::
        \hat w_i = c_{a(i)}, \qquad
        \frac{\partial L}{\partial c_k} = \sum_{i: a(i) = k} \frac{\partial L}{\partial \hat w_i}

    Centroids :math:`c` are learned parts: the optimizer ``compressed_training(..., learned=)``
    trains them. Which entry has which, :math:`a`, is fixed, and the parameter itself then gets no
    updates; or decided again ``every`` so many updates, from a parameter that is trained on by
    straight-through gradients. Entries under a mask of ``prune`` have no code: they are 0. Each
    entry of a stack has codebooks of its own.

    With ``stats``, squared errors of entries are weighted by the Fisher information of
    ``jc.measures.fisher()`` if they have it, else by the second moment of what entries meet.

    Args:
        clusters: Values per codebook, 2 to 65536. Codes take ``ceil(log2(clusters))`` bits.
        init: Where k-means begins: ``"linear"``, between the extremes; ``"density"``, at quantiles;
            ``"kmeans++"``; or ``"random"``. For vectors not the first.
        group_size: Consecutive entries along the last contracted axis that share a codebook, among
            all other entries; must divide the axis. By default all.
        vector: Consecutive entries along that axis that have one code together (product
            quantization); must divide the axis, or the group.
        where: Which parameters; by default the floating ones of rank 2 and more, and where uses are
            given only those with a use.
        per: ``"tensor"``: one codebook for a parameter; ``"channel"``: one per output.
        stack: How many leading axes of each are a stack of parameters of their own, whatever uses
            say of them, such as the members of an ensemble under `jax.vmap`.
        zero: Whether the first centroid is 0 and stays there, so that entries of 0 do. By default
            for numbers that have no mask, and not for vectors.
        key: A random key, for ``"kmeans++"`` and ``"random"``.
        iterations: Of k-means, at most.
        centroid_dtype: What holds centroids: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        begin: The update after which entries share values; until then they are left as they are.
        every: After how many updates codes are decided again, by the nearest centroid.

    Returns:
        A `Compression` with learned parts, that stores `CodebookArray`.

    Raises:
        ValueError: Options out of range; in ``init``: a parameter without an axis, groups or
            vectors that do not divide, or vectors of a pruned parameter.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jnp.array([[1.1, 0.0, -2.0, 0.9], [3.0, 1.0, 0.1, -2.2]])}
        >>> small = jc.compress(params, jc.share(clusters=4))
        >>> small["w"].materialize().round(2)
        Array([[ 1. ,  0. , -2.1,  1. ],
               [ 3. ,  1. ,  0. , -2.1]], dtype=float32)

    References:
        Han et al., 2016, Deep Compression. Gong et al., 2014, Compressing Deep Convolutional
        Networks using Vector Quantization. Choi et al., 2017, Towards the Limit of Network
        Quantization.
    """
    options = _Options(clusters, group_size, vector, per, zero, centroid_dtype, every is not None)
    _check_options(options, init, key, iterations, begin, every)
    how = (clusters, init, iterations)

    def check(parameter: Parameter) -> None:
        _check_parameter(parameter, options)

    def clustered(state: SharedState, parameter: Parameter) -> Decision:
        """k-means of the values, and the nearest centroids."""
        books, w = state.books, dense(parameter.value)
        own = None if key is None else jax.random.fold_in(key, zlib.crc32(parameter.path.encode()))
        weight, keep = _importance(parameter)
        codes, centroids = _clustered(w, weight, keep, own, books, state.zero, how)
        return Decision(dataclasses.replace(state, codes=codes), {"centroids": centroids})

    def start(parameter: Parameter) -> Decision:
        books, shape = options.books(parameter), tuple(parameter.value.shape)
        pinned = parameter.keep is None and vector == 1 if zero is None else zero
        active = None if begin == 0 else jnp.zeros((), bool)
        state = SharedState(None, active, books, clusters, pinned, options.moves, centroid_dtype)
        if begin == 0:
            return clustered(state, parameter)
        sizes = [n // vector if d - len(shape) == books.axis else n for d, n in enumerate(shape)]
        many = math.prod(shape[d] for d in books.apart) * books.groups
        empty = books.centroids(jnp.zeros((many, clusters, vector)), shape)
        codes = as_codes(jnp.zeros(sizes, jnp.int32), clusters)
        return Decision(dataclasses.replace(state, codes=codes), {"centroids": empty})

    def update(decision: Decision, count: jax.Array, parameter: Parameter) -> Decision:
        if begin:
            state = dataclasses.replace(decision.state, active=count >= begin)
            decision = decision._replace(state=state)
            fresh = lambda: clustered(state, parameter)
            decision = lax.cond(count == begin, fresh, lambda: decision)
        if every is None:
            return decision
        again = (count > begin) & ((count - begin) % every == 0)
        return lax.cond(again, lambda: _reassigned(decision, parameter), lambda: decision)

    asked = spelled(
        "share",
        clusters,
        init=init,
        group_size=group_size,
        vector=vector,
        where=where,
        per=per,
        stack=stack or None,
        zero=zero,
        centroid_dtype=centroid_dtype,
    )
    return compression_of(LeafMethod(check, start, update), where, stack=stack, asked=asked)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What a call asks for, of any parameter."""

    clusters: int
    group_size: int | None
    vector: int
    per: str
    zero: bool | None
    held: str
    moves: bool

    def books(self, parameter: Parameter) -> Books:
        """How a parameter is cut."""
        layout, shape = parameter.layout, parameter.value.shape
        axis = _axis(layout, len(shape))
        apart = {*layout.stack, *(layout.output if self.per == "channel" else ())} - {axis}
        groups = 1 if self.group_size is None else shape[axis] // self.group_size
        return Books(axis, groups, self.vector, tuple(sorted(apart)))


def _axis(layout: Layout, rank: int) -> int:
    """The axis along which vectors and groups run: the last one that is contracted."""
    free = (d for d in range(-1, -rank - 1, -1) if d not in layout.stack)
    axis = layout.group_axis
    return next(free) if axis is None else axis


@functools.partial(jax.jit, static_argnames=("books", "zero", "how"))
def _clustered(
    w: jax.Array,
    weight: jax.Array,
    keep: jax.Array,
    key: Any,
    books: Books,
    zero: bool,
    how: tuple[int, str, int],
) -> tuple[jax.Array, jax.Array]:
    """Codes and centroids of a parameter; compiled as one."""
    x = books.members(w.astype(jnp.float32))
    clusters, init, iterations = how
    weight, kept = (jnp.mean(books.members(a), -1) for a in (weight, keep))
    # What met nothing counts a little, or it is left out of the range; all alike if nothing did.
    mean = jnp.sum(weight, 1, keepdims=True) / jnp.maximum(jnp.sum(kept, 1, keepdims=True), 1e-30)
    weight = weight + kept * jnp.where(mean > 0, 1e-6 * mean, 1.0)
    centroids = kmeans(x, weight, clusters, init, key, zero, iterations)
    codes, centroids = _assigned(x, centroids, zero)
    codes = as_codes(books.codes(codes, w.shape), clusters)
    return codes, books.centroids(centroids, w.shape)


def _assigned(x: jax.Array, centroids: jax.Array, zero: bool) -> tuple[jax.Array, jax.Array]:
    """The nearest centroids; NaN in the codebooks of members that are NaN or infinite."""
    bad = jnp.any(~jnp.isfinite(x), (1, 2), keepdims=True)
    # The last one, since the first may be held at 0.
    codes = jnp.where(bad[..., 0], centroids.shape[1] - 1, nearest(x, centroids, zero))
    return codes, jnp.where(bad, jnp.nan, centroids)


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
    """The nearest of the present centroids for each vector."""
    state, learned = decision
    books, w = state.books, dense(parameter.value)
    held = state.centroids(learned).astype(jnp.float32)
    x = books.members(w.astype(jnp.float32))
    codes, centroids = _assigned(x, _per_book(held, books, state.clusters), state.zero)
    # In those that are trained, nothing else changes.
    marked = jnp.isnan(books.centroids(centroids, w.shape))
    learned = {"centroids": jnp.where(marked, jnp.nan, learned["centroids"])}
    codes = as_codes(books.codes(codes, w.shape), state.clusters)
    return Decision(dataclasses.replace(state, codes=codes), learned)


def _per_book(centroids: jax.Array, books: Books, clusters: int) -> jax.Array:
    """Inverts `Books.centroids`."""
    last = jnp.moveaxis(centroids, centroids.ndim + books.axis, -1)
    return last.reshape(-1, clusters, books.vector)


def _check_options(
    options: _Options, init: str, key: Any, iterations: int, begin: int, every: int | None
) -> None:
    if not 2 <= options.clusters <= 2**16:
        raise ValueError(f"clusters={options.clusters}; there are at least 2, at most 65536")
    if init not in INITS:
        raise ValueError(f"init={init!r}; there are {', '.join(map(repr, INITS))}")
    if (key is None) == (init in ("kmeans++", "random")):
        need = "needs key=jax.random.key(...)" if key is None else "draws nothing: leave out key="
        raise ValueError(f"init={init!r} {need}")
    if options.per not in ("tensor", "channel"):
        raise ValueError(f"per={options.per!r}; there are 'tensor' and 'channel'")
    if options.held not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            f"centroid_dtype={options.held!r}; there are 'float32', 'bfloat16' and 'float16'"
        )
    for name, value in (("vector", options.vector), ("group_size", options.group_size or 1)):
        if value < 1:
            raise ValueError(f"{name}={value}; it holds at least one entry")
    if begin < 0 or iterations < 0 or (every is not None and every < 1):
        raise ValueError(
            f"begin={begin}, every={every}, iterations={iterations}: begin and iterations are at "
            "least 0, and every at least 1"
        )


def _check_parameter(parameter: Parameter, options: _Options) -> None:
    value, shape = parameter.value, tuple(parameter.value.shape)
    if is_compressed(value) and not isinstance(value, (SparseArray, MaskedArray)):
        raise TypeError(
            f"{parameter.describe()} is already a {type(value).__name__} and cannot share values; "
            "materialize it first"
        )
    if len(shape) <= len(parameter.layout.stack):
        raise ValueError(f"{parameter.describe()} has one entry each and none to share: exclude it")
    length = shape[_axis(parameter.layout, len(shape))]
    unit = options.group_size or options.vector
    if length % unit or unit % options.vector:
        raise ValueError(
            f"{parameter.describe()}: group_size={options.group_size} and vector={options.vector} "
            f"do not divide the {length} entries of its last contracted axis; take divisors, or "
            "exclude it by where="
        )
    if options.vector > 1 and parameter.keep is not None:
        raise ValueError(
            f"chain: share with vector={options.vector} cannot follow what prunes "
            f"{parameter.describe()}: a vector has one code, whichever entries are 0; take vector=1"
        )
