"""Examples of arrays of factors: low rank, Tucker, CP and tensor trains."""

import math

import jax.numpy as jnp

from jaxopt_compress.arrays import LowRankArray, PermutedArray, TensorTrainArray, TuckerArray
from tests.arrays.coded import quantized
from tests.arrays.example import Example, K, N, normal


def low_rank(left, right, rank, *, dtype="float32", factor="float32"):
    """Two dense factors."""

    def build(rng, stack):
        u = normal(rng, *stack, *left, *(1,) * (len(right) - 1), rank, dtype=factor)
        v = normal(rng, *stack, *(1,) * (len(left) - 1), rank, *right, dtype=factor)
        leaf = LowRankArray(u, v, jnp.dtype(dtype), len(right))
        return Example(leaf, lambda u, v: multiply(u, v, stack, left, right).astype(dtype))

    return build


def permuted(left, right, rank):
    """Two factors whose left axis lies between the right ones: ``[right, left, right]``."""
    plain = low_rank(left, right, rank)

    def build(rng, stack):
        leaf, formula = plain(rng, stack)
        moved = lambda w: jnp.swapaxes(w, -3, -2)
        return Example(PermutedArray(leaf, (-2, -3, -1)), lambda u, v: moved(formula(u, v)))

    return build


def multiply(u, v, stack, left, right):
    """The product of two factors as one einsum of matrices."""
    u = u.reshape(*stack, -1, u.shape[-1]).astype(jnp.float32)
    v = v.reshape(*stack, u.shape[-1], -1).astype(jnp.float32)
    w = jnp.einsum("...kr,...rn->...kn", u, v, precision="highest")
    return w.reshape(*stack, *left, *right)


def quantized_factors(rng, stack):
    """Factors of 8 and of 4 bits."""
    u, pu = quantized((K, 3), "int8", -2, (1, 3))(rng, stack)
    v, pv = quantized((3, N), "int4", -2, (1, N))(rng, stack)
    leaf = LowRankArray(u, v, jnp.dtype("float32"))
    return Example(leaf, lambda a, b: multiply(pu(a), pv(b), stack, (K,), (N,)))


def tucker(rng, stack):
    """A kernel ``[3, 3, 16, 8]`` by way of 4 and 2 channels."""
    sizes = (1, 1, 16, 4), (3, 3, 4, 2), (1, 1, 2, 8)
    parts = [normal(rng, *stack, *size) for size in sizes]

    def formula(first, core, last):
        how = "...ia,...hwab,...bo->...hwio"
        first, last = (x.reshape(*stack, *x.shape[-2:]) for x in (first, last))
        return jnp.einsum(how, first, core, last, precision="highest")

    return Example(TuckerArray(*parts, jnp.dtype("float32"), (-2, -1)), formula)


def cp(rng, stack):
    """A kernel ``[3, 3, 16, 8]`` by way of 4 channels that the window meets one by one."""
    sizes = (1, 1, 16, 4), (3, 3, 1, 4), (1, 1, 4, 8)
    parts = [normal(rng, *stack, *size) for size in sizes]

    def formula(first, core, last):
        first, last = (x.reshape(*stack, *x.shape[-2:]) for x in (first, last))
        core = core.reshape(*stack, 3, 3, 4)
        how = "...ia,...hwa,...ao->...hwio"
        return jnp.einsum(how, first, core, last, precision="highest")

    return Example(TuckerArray(*parts, jnp.dtype("float32"), (-2, -1)), formula)


def tensor_train(rows, columns, ranks, cut=(0, 0)):
    """Cores of digits; the dense array without its last rows and columns."""
    ends = (1, *ranks, 1)
    sizes = list(zip(ends, rows, columns, ends[1:], strict=False))

    def build(rng, stack):
        cores = tuple(normal(rng, *stack, r * n, m * s) for r, n, m, s in sizes)

        def formula(*cores):
            names, parts = "abcd", []
            for core, size in zip(cores, sizes, strict=True):
                parts.append(core.reshape(*stack, *size))
            letters = [
                f"...{names[k]}{'ijk'[k]}{'xyz'[k]}{names[k + 1]}" for k in range(len(parts))
            ]
            out = "..." + "ijk"[: len(parts)] + "xyz"[: len(parts)]
            w = jnp.einsum(f"{','.join(letters)}->{out}", *parts, precision="highest")
            w = w.reshape(*stack, math.prod(rows), math.prod(columns))
            return w[..., : w.shape[-2] - cut[0], : w.shape[-1] - cut[1]]

        leaf = TensorTrainArray(cores, jnp.dtype("float32"), rows[1:], columns[1:], cut)
        return Example(leaf, formula)

    return build
