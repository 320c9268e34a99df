"""Canonical polyadic decompositions of three-way arrays, as of the kernels of convolutions."""

import functools

import jax
import jax.numpy as jnp

from jaxopt_compress.numerics.rounding import promoted

# A share of the mean diagonal that is added before a solve: near-parallel terms stay finite.
_RIDGE = 1e-6


@functools.partial(jax.jit, static_argnames=("rank", "rounds"))
def cp3(
    w: jax.Array, rank: int, rounds: int = 100, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""A sum of products of three vectors, by alternating least squares.

    .. math:: W_{sio} \approx \sum_r C_{sr} A_{ir} B_{ro}

    Each round solves for one of the three with the others fixed, in turn, so the error falls. The
    first guess is the leading singular vectors of each unfolding, and normal vectors where the rank
    is above their number. The best sum need not exist, and what is found depends on the guess.

    Args:
        w: Floats, ``[s, i, o]``: positions, input and output channels.
        rank: How many products.
        rounds: How often each of the three is solved for.
        key: The random key of the first guess; by default a fixed one.

    Returns:
        ``(A, C, B)``, float32 or wider: ``[i, rank]``, ``[s, rank]`` and ``[rank, o]``; the norm of
        each product is shared evenly.

    References:
        Hitchcock, 1927, The Expression of a Tensor or a Polyadic as a Sum of Products. Carroll and
        Chang, 1970, Analysis of Individual Differences in Multidimensional Scaling. Lebedev et al.,
        2015, Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition.
    """
    x = w.astype(promoted(w.dtype, jnp.float32))
    top = jnp.max(jnp.abs(x))
    x = x / jnp.where(top > 0, top, 1)
    keys = jax.random.split(jax.random.key(0) if key is None else key, 3)

    def guess(axis: str, key: jax.Array) -> jax.Array:
        gram = _sum({"s": "sio,tio->st", "i": "sio,sjo->ij", "o": "sio,sip->op"}[axis], x, x)
        vectors = jnp.linalg.eigh(gram)[1][:, ::-1][:, :rank]
        n = gram.shape[0]
        more = jax.random.normal(key, (n, max(rank - n, 0)), x.dtype) / jnp.sqrt(n)
        return jnp.concatenate([vectors, more], 1)

    def solved(how: str, p: jax.Array, q: jax.Array) -> jax.Array:
        """The least squares solution for one factor, the other two given."""
        gram = _sum("pr,pt->rt", p, p) * _sum("qr,qt->rt", q, q)
        ridge = _RIDGE * jnp.trace(gram) / rank + jnp.finfo(x.dtype).tiny
        right = _sum(how, x, p, q)
        # No Cholesky factor: where products depend on each other, rounding exceeds the ridge.
        size, turn = jnp.linalg.eigh(gram)
        size = jnp.maximum(size, 0) + ridge
        return _sum("kr,tr->kt", _sum("kr,rt->kt", right, turn) / size, turn)

    def step(found: tuple, _: None) -> tuple[tuple, None]:
        a, c, b = found
        c = _unit(solved("sio,ir,or->sr", a, b))
        a = _unit(solved("sio,sr,or->ir", c, b))
        return (a, c, solved("sio,sr,ir->or", c, a)), None

    first = tuple(guess(axis, k) for axis, k in zip("iso", keys, strict=True))
    (a, c, b), _ = jax.lax.scan(step, first, None, length=rounds)
    size = jnp.linalg.norm(b, axis=0) * top
    b = _unit(b) * jnp.cbrt(size)
    return a * jnp.cbrt(size), c * jnp.cbrt(size), b.T


def _unit(x: jax.Array) -> jax.Array:
    """Columns of norm 1, or of zeros."""
    size = jnp.linalg.norm(x, axis=0)
    return x / jnp.where(size > 0, size, 1)


def _sum(how: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(how, *operands, precision=jax.lax.Precision.HIGHEST)
