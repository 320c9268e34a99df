"""Tucker decompositions along two axes, as of the kernels of convolutions."""

import functools

import jax
import jax.numpy as jnp

from jaxopt_compress.numerics.svd import unit_range


@functools.partial(jax.jit, static_argnames=("inner", "outer", "rounds"))
def tucker2(
    w: jax.Array, inner: int, outer: int, rounds: int = 5
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""The nearly best approximation whose inputs and outputs go through fewer channels.

    .. math:: W_{sio} \approx \sum_{ab} A_{ia} G_{sab} B_{bo}

    from the singular vectors of both unfoldings (HOSVD), renewed in turn (HOOI). No round makes the
    error larger, and the first is within a factor of :math:`\sqrt 2` of the least.

    Args:
        w: Floats, ``[s, i, o]``: positions, input and output channels.
        inner: How many channels ``a`` runs over, at most ``i``.
        outer: How many channels ``b`` runs over, at most ``o``.
        rounds: How often both sides are renewed.

    Returns:
        ``(A, G, B)``, float32: ``[i, inner]`` and ``[outer, o]`` with orthonormal columns and rows,
        and ``[s, inner, outer]``.

    References:
        Tucker, 1966, Some Mathematical Notes on Three-Mode Factor Analysis. De Lathauwer et al.,
        2000, On the Best Rank-1 and Rank-(R1, R2, ..., RN) Approximation. Kim et al., 2016,
        Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
        Applications.
    """
    x, exponent = _in_unit_range(w)

    def along(y: jax.Array, axis: str, count: int) -> jax.Array:
        """The leading singular vectors of an unfolding, from its products with itself."""
        gram = _sum({"i": "sio,sjo->ij", "o": "sio,sip->op"}[axis], y, y)
        return jnp.linalg.eigh(gram)[1][:, ::-1][:, :count]

    def step(b: jax.Array, _: None) -> tuple[jax.Array, None]:
        a = along(_sum("sio,ob->sib", x, b), "i", inner)
        return along(_sum("sio,ia->sao", x, a), "o", outer), None

    b, _ = jax.lax.scan(step, along(x, "o", outer), None, length=rounds)
    a = along(_sum("sio,ob->sib", x, b), "i", inner)
    return a, jnp.ldexp(_sum("sio,ia,ob->sab", x, a, b), exponent), b.T


def mode_energies(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The squared singular values of both unfoldings, from the largest on.

    Args:
        w: Floats, ``[s, i, o]``.

    Returns:
        Float32 ``[i]`` and ``[o]``, in units of a power of two near the largest entry's square.
    """
    x, _ = _in_unit_range(w)
    grams = _sum("sio,sjo->ij", x, x), _sum("sio,sip->op", x, x)
    first, second = (jnp.maximum(jnp.linalg.eigvalsh(g)[::-1], 0) for g in grams)
    return first, second


def _in_unit_range(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `unit_range`, of all positions together."""
    x, exponent = unit_range(w.reshape(-1, w.shape[-1]))
    return x.reshape(w.shape), exponent


def _sum(how: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(how, *operands, precision=jax.lax.Precision.HIGHEST)
