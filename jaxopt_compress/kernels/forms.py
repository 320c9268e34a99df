"""Shared by all products: checks, a form for each platform, and transformations of forms."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from jaxopt_compress.numerics.rounding import promoted

_MANY = 2**20
GPUS = ("cuda", "rocm")
ACCELERATORS = ("tpu", *GPUS)


def on_each_platform(forms, default, *args):
    """Calls the form of the platform that the program is lowered for."""
    return lax.platform_dependent(*args, **forms, default=default) if forms else default(*args)


def row_count(x):
    """How many rows `x` has, to choose a form by; a symbolic number, of `jax.export`, is many."""
    rows = x.shape[-2]
    return rows if isinstance(rows, int) else _MANY


def spread_out(x, groups):
    """Each row once per group, with zeros where another group is: `[*batch, groups * M, K]`.

    Example:
      >>> print(spread_out(jnp.array([[1, 2, 3, 4]]), 2))
      [[1 2 0 0]
       [0 0 3 4]]
    """
    *batch, rows, depth = x.shape
    # Counted where it is needed: a constant would be read from memory for every product.
    first, k = (lax.broadcasted_iota(jnp.int32, (groups, 1, depth), d) for d in (0, 2))
    first *= depth // groups
    own = (k >= first) & (k < first + depth // groups)
    blocks = jnp.where(own, x[..., None, :, :], jnp.zeros((), x.dtype))
    return blocks.reshape(*batch, groups * rows, depth)


def with_rows_merged(product, otherwise=None):
    """`product(x, *weight)` with one rule: rows that share a weight stay in one product.

    Its form depends on how many they are, so that it is chosen again after `jax.vmap`. Other axes
    become axes in front of all operands, or are mapped over `otherwise`.
    """
    forward = custom_vmap(product)

    @forward.def_vmap
    def _(size, mapped, x, *weight):
        if mapped[0] and not any(mapped[1:]):
            rows = jnp.moveaxis(x, 0, -3)
            y = forward(rows.reshape(*rows.shape[:-3], -1, rows.shape[-1]), *weight)
            y = y.reshape(*y.shape[:-2], size, -1, y.shape[-1])
            return jnp.moveaxis(y, -3, 0), True
        if otherwise is not None:
            axes = [0 if m else None for m in mapped]
            return jax.vmap(otherwise, axes)(x, *weight), True
        full = [
            a if m else jnp.broadcast_to(a, (size, *a.shape))
            for a, m in zip((x, *weight), mapped, strict=True)
        ]
        return forward(*full), True

    return forward


def differentiated_as(linear, forward):
    """`forward` with the derivatives of `linear`, which are asked for where they are not zero."""
    fn = jax.custom_jvp(forward)

    def jvp(primals, tangents):
        moving = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]

        def along(*values):
            arguments = list(primals)
            for i, value in zip(moving, values, strict=True):
                arguments[i] = value
            return linear(*arguments)

        _, tangent = jax.jvp(along, [primals[i] for i in moving], [tangents[i] for i in moving])
        return fn(*primals), tangent

    fn.defjvp(jvp, symbolic_zeros=True)
    return fn


def varying_alike(arrays):
    """Arrays that vary over the same axes of a manual mesh: all those that any of them varies over.

    The transpose sums over the axes that were added to an array.
    """
    own = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset().union(*own)
    missing = [tuple(sorted(every - axes)) for axes in own]
    cast = lambda x, axes: lax.pcast(x, axes, to="varying") if axes else x
    return [cast(x, axes) for x, axes in zip(arrays, missing, strict=True)]


def matrix_product(x, weight, preferred, precision=None):
    """`x @ weight` with a type of the result."""
    batch = tuple(range(x.ndim - 2))
    dims = (((x.ndim - 1,), (x.ndim - 2,)), (batch, batch))
    return lax.dot_general(x, weight, dims, precision=precision, preferred_element_type=preferred)


def wide_of(dtype):
    """Float32, or a wider floating type."""
    whole = jnp.issubdtype(dtype, jnp.integer)  # Those of four bits are not promoted.
    return jnp.dtype(jnp.float32) if whole else promoted(dtype, jnp.float32)
