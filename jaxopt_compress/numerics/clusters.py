"""Weighted k-means: of numbers by sorting once, of vectors by distances."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

INITS = ("linear", "density", "kmeans++", "random")

# Distances to all centroids that are there at a time.
_DISTANCES = 2**24
# Entries whose prefix sums are as exact as float32 counts.
_SUMMED = 2**12


@functools.partial(jax.jit, static_argnames=("clusters", "init", "zero", "iterations"))
def kmeans(
    x: jax.Array,
    weight: jax.Array,
    clusters: int,
    init: str = "linear",
    key: jax.Array | None = None,
    zero: bool = False,
    iterations: int = 50,
) -> jax.Array:
    r"""Centroids of :math:`\min \sum_i h_i \lVert x_i - c_{a(i)} \rVert^2` by Lloyd's iteration.

    Numbers are sorted once: a cluster is an interval between the middles of neighbouring centroids,
    and its mean a difference of prefix sums. So an iteration takes as many binary searches as there
    are centroids, and reads no entry.

    Args:
        x: ``[books, members, vector]``, float32, finite; each book is a problem of its own.
        weight: ``[books, members]``, at least 0; a member of weight 0 counts for nothing.
        clusters: Centroids per book.
        init: ``"linear"``: evenly between the extremes (of vectors: along the diagonal);
            ``"density"``: quantiles (of vectors: members at equal distances in order of their
            sums); ``"kmeans++"``; ``"random"``: members. Draws that leave a side of ``zero``
            without a centroid are quantiles instead.
        key: For the last two.
        zero: Whether the first centroid is 0 and stays there.
        iterations: At most; it ends where nothing moves.

    Returns:
        ``[books, clusters, vector]``: ascending (of numbers), but for a first one that is 0. A
        centroid that no member is nearest to stays where it was.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([-1.0, -0.8, 0.5, 2.0, 2.2]).reshape(1, 5, 1)
        >>> kmeans(x, jnp.ones((1, 5)), clusters=3).ravel().round(2)
        Array([-0.9,  0.5,  2.1], dtype=float32)

    References:
        Lloyd, 1982, Least Squares Quantization in PCM. Arthur and Vassilvitskii, 2007, k-means++:
        The Advantages of Careful Seeding. Han et al., 2016, Deep Compression.
    """
    books, members, vector = x.shape
    if not members or not books:
        return jnp.zeros((books, clusters, vector), jnp.float32)
    top = magnitudes(x)
    x = x * (1 / top)
    weight = weight / jnp.maximum(jnp.max(weight, 1, keepdims=True), 2.0**-125)
    keys = None if key is None else jax.random.split(key, books)
    begin = functools.partial(_START[init], clusters=clusters)
    start = begin(x, weight) if keys is None else jax.vmap(begin)(x, weight, keys)
    if zero and vector == 1 and keys is not None:
        start = _both_sides(x, weight, start)
    solve = _numbers if vector == 1 else _vectors
    found = solve(x, weight, lax.optimization_barrier(start), zero, iterations)
    return found * top


def magnitudes(x: jax.Array) -> jax.Array:
    """The power of two of each book's largest entry: scales by it round nothing, and squares fit.

    Args:
        x: ``[books, members, vector]``, with at least one member.

    Returns:
        ``[books, 1, 1]``.
    """
    top = jnp.clip(jnp.max(jnp.abs(x), (1, 2), keepdims=True), 2.0**-125, 2.0**125)
    return lax.reduce_precision(top, exponent_bits=8, mantissa_bits=0)


def nearest(x: jax.Array, centroids: jax.Array, zero: bool = False) -> jax.Array:
    """Which centroid each member is nearest to.

    Args:
        x: ``[books, members, vector]``, float32.
        centroids: ``[books, clusters, vector]``, float32.
        zero: Whether the first one is 0; members that are 0 then belong to it.

    Returns:
        int32 ``[books, members]``. A number halfway between two takes the lower centroid.
    """
    if x.shape[-1] > 1:
        return jax.vmap(_nearest_vectors)(x, centroids)
    x, centroids = x[..., 0], centroids[..., 0]
    order = jnp.argsort(centroids, axis=-1)
    bounds = _middles(jnp.take_along_axis(centroids, order, -1))
    place = jax.vmap(jnp.searchsorted)(bounds, x)
    codes = jnp.take_along_axis(order, place, -1).astype(jnp.int32)
    return jnp.where(x == 0, 0, codes) if zero else codes


def _middles(c: jax.Array) -> jax.Array:
    """Halfway between neighbours; halves are added, since a sum may overflow."""
    half = lax.optimization_barrier(c * 0.5)  # Compilers would halve the sum.
    return half[..., :-1] + half[..., 1:]


def _numbers(
    x: jax.Array, weight: jax.Array, start: jax.Array, zero: bool, iterations: int
) -> jax.Array:
    c = jnp.sort(start[..., 0], -1)
    x, weight = lax.sort((x[..., 0], weight), num_keys=1)
    # A product is not to be contracted with a sum, which programs would do differently.
    mass, total = interval_sums(weight), interval_sums(lax.optimization_barrier(weight * x))
    # The one nearest to 0 becomes 0. Others cannot pass it, so it keeps its place.
    fixed = jnp.argmin(jnp.abs(c), -1, keepdims=True) == jnp.arange(c.shape[-1])
    pinned = (lambda c: jnp.where(fixed, 0.0, c)) if zero else (lambda c: c)
    edge = lambda value: jnp.full((len(c), 1), value, jnp.int32)

    def bounds(c: jax.Array) -> jax.Array:
        cuts = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(x, _middles(c))
        return jnp.concatenate([edge(0), cuts.astype(jnp.int32), edge(x.shape[-1])], -1)

    def improved(c: jax.Array) -> jax.Array:
        cuts = bounds(c)
        there = mass(cuts)
        means = total(cuts) / jnp.where(there > 0, there, 1)
        # Differences of sums are not exact, and a mean lies between its members.
        first = jnp.take_along_axis(x, jnp.minimum(cuts[:, :-1], x.shape[-1] - 1), -1)
        last = jnp.take_along_axis(x, jnp.maximum(cuts[:, 1:] - 1, 0), -1)
        means = jnp.clip(means, first, jnp.maximum(first, last))
        return pinned(jnp.where(there > 0, means, c))

    c = _until_still(improved, pinned(c), iterations)
    if zero:  # First comes the one that is 0; the others stay in order.
        at = jnp.argmin(jnp.abs(c), -1, keepdims=True)
        places = jnp.arange(c.shape[-1])
        c = jnp.take_along_axis(c, jnp.where(places > at, places, jnp.maximum(places - 1, 0)), -1)
        c = jnp.where(places == 0, 0.0, c)
    return c[..., None]


def interval_sums(y: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Sums of consecutive entries, as exact for the last of many millions as for the first.

    Prefix sums start anew in each block of entries, and those of blocks have twice the digits: a
    float32 that counts up to 2^24 entries does not see the next one.

    Args:
        y: ``[books, members]``, float32.

    Returns:
        ``sums(cuts)``, of int32 ``[books, n]``, ascending: the ``[books, n - 1]`` sums between.

    Example:
        >>> import jax.numpy as jnp
        >>> interval_sums(jnp.array([[1.0, 2.0, 4.0]]))(jnp.array([[0, 1, 1, 3]])).tolist()
        [[1.0, 0.0, 6.0]]
    """
    books, members = y.shape
    padded = jnp.pad(y, ((0, 0), (0, _SUMMED - members % _SUMMED)))
    blocks = padded.reshape(books, -1, _SUMMED)
    before = lambda z: jnp.pad(z, ((0, 0), (1, 0)))[:, :-1]
    within = jnp.pad(jnp.cumsum(blocks, -1), ((0, 0), (0, 0), (1, 0)))[..., :-1]
    totals = jnp.sum(blocks, -1)
    high, low = lax.associative_scan(_two_sum, (totals, jnp.zeros_like(totals)), axis=1)

    def sums(cuts: jax.Array) -> jax.Array:
        part = lambda z, at: jnp.diff(jnp.take_along_axis(z, at, -1))
        whole = [part(before(z), cuts // _SUMMED) for z in (high, low)]
        return whole[0] + whole[1] + part(within.reshape(books, -1), cuts)

    return sums


def _two_sum(
    a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The sum of two numbers, each of a float32 and what it lacks (Knuth)."""
    total = lax.optimization_barrier(a[0] + b[0])
    second = total - a[0]
    lacks = (a[0] - (total - second)) + (b[0] - second)
    return total, lacks + (a[1] + b[1])


def _vectors(
    x: jax.Array, weight: jax.Array, start: jax.Array, zero: bool, iterations: int
) -> jax.Array:
    first = jnp.arange(start.shape[1])[:, None] == 0
    pinned = (lambda c: jnp.where(first, 0.0, c)) if zero else (lambda c: c)

    def improved(x: jax.Array, weight: jax.Array, c: jax.Array) -> jax.Array:
        codes = _nearest_vectors(x, c)
        sums = lambda y: jax.ops.segment_sum(y, codes, len(c))
        there = sums(weight)[:, None]
        means = sums(x * weight[:, None]) / jnp.where(there > 0, there, 1)
        return pinned(jnp.where(there > 0, means, c))

    step = lambda c: jax.vmap(improved)(x, weight, c)
    return _until_still(step, jax.vmap(pinned)(start), iterations)


def _nearest_vectors(x: jax.Array, c: jax.Array) -> jax.Array:
    """By squared distances, for some members at a time."""
    # From about their mean: what all have in common would leave no digits for what differs.
    middle = jnp.sum(c * (1 / len(c)), 0)
    c = c - middle
    norms = jnp.sum(c * c, -1)
    closest = lambda v: jnp.argmin(norms - 2 * jnp.matmul(c, v, precision="highest"), -1)
    codes = lambda v: closest(v - middle)
    size = max(1, _DISTANCES // len(c))
    if len(x) <= size:
        return jax.vmap(codes)(x).astype(jnp.int32)
    return lax.map(codes, x, batch_size=size).astype(jnp.int32)


def _until_still(step: Callable[..., jax.Array], c: jax.Array, iterations: int) -> jax.Array:
    def go_on(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        i, moved, _ = state
        return moved & (i < iterations)

    def go(
        state: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        i, _, c = state
        new = step(c)
        return i + 1, jnp.any(new != c), new

    return lax.while_loop(go_on, go, (jnp.int32(0), jnp.array(True), c))[2]


def _linear(x: jax.Array, weight: jax.Array, clusters: int) -> jax.Array:
    there = (weight > 0)[..., None]
    any_ = jnp.any(there, 1)
    low = jnp.where(any_, jnp.min(jnp.where(there, x, jnp.inf), 1), 0)
    high = jnp.where(any_, jnp.max(jnp.where(there, x, -jnp.inf), 1), 0)
    shares = jnp.linspace(0.0, 1.0, clusters).reshape(-1, 1)
    return low[:, None] * (1 - shares) + high[:, None] * shares


def _density(x: jax.Array, weight: jax.Array, clusters: int) -> jax.Array:
    order = jnp.argsort(jnp.sum(x, -1), axis=-1)
    running = jnp.cumsum(jnp.take_along_axis(weight, order, -1), -1)
    shares = (jnp.arange(clusters) + 0.5) / clusters
    at = jax.vmap(jnp.searchsorted)(running, running[:, -1:] * shares)
    at = jnp.take_along_axis(order, jnp.minimum(at, x.shape[1] - 1), -1)
    return jnp.take_along_axis(x, at[..., None], 1)


def _random(x: jax.Array, weight: jax.Array, key: jax.Array, clusters: int) -> jax.Array:
    chance = jnp.where(weight > 0, jax.random.uniform(key, weight.shape), -1.0)
    at = lax.top_k(chance, min(clusters, len(x)))[1]
    return x[jnp.resize(at, (clusters,))]


def _plus_plus(x: jax.Array, weight: jax.Array, key: jax.Array, clusters: int) -> jax.Array:
    """Members, one after the other, by their squared distance to those that are chosen."""

    def choose(i: jax.Array, chance: jax.Array) -> jax.Array:
        noise = jax.random.gumbel(jax.random.fold_in(key, i), weight.shape)
        return x[jnp.argmax(jnp.log(chance) + noise)]

    def add(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chosen, distance = state
        new = choose(i, jnp.where(jnp.max(distance) > 0, distance * weight, weight))
        return chosen.at[i].set(new), jnp.minimum(distance, jnp.sum((x - new) ** 2, -1))

    first = choose(jnp.int32(0), weight)
    chosen = jnp.zeros((clusters, x.shape[-1])).at[0].set(first)
    return lax.fori_loop(1, clusters, add, (chosen, jnp.sum((x - first) ** 2, -1)))[0]


def _both_sides(x: jax.Array, weight: jax.Array, start: jax.Array) -> jax.Array:
    """Quantiles in the place of a start that has centroids on one side of 0, and members on both.

    One of the centroids becomes 0 and stays, and no other can pass it: all members of the other
    side would be 0 for ever.
    """
    c = jnp.sort(start, 1)
    at = jnp.argmin(jnp.abs(c), 1, keepdims=True)
    there = (weight > 0)[..., None]
    below = (at == 0) & jnp.any(there & (x < 0), 1, keepdims=True)
    above = (at == c.shape[1] - 1) & jnp.any(there & (x > 0), 1, keepdims=True)
    return jnp.where(below | above, _density(x, weight, c.shape[1]), start)


_START = {"linear": _linear, "density": _density, "kmeans++": _plus_plus, "random": _random}
