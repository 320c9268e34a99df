"""Products of integer codes of a backward pass, whose operands lie transposed."""

import jax.numpy as jnp
from jax import lax

from jaxopt_compress.kernels.forms import on_each_platform
from jaxopt_compress.kernels.integer_dots import exact_parts, in_parts


def transposed_dot(a, b, *, last=False):
    """A product of int8 codes that may lie transposed in memory, as those of a backward pass do.

    XLA:CPU multiplies rows of `a` that lie one after the other, in any order of `b`, in about half
    of the time of float32, and all others in three times that. It would fold a transposition that
    made `a` into the product: behind a padded copy it does not.

    Args:
      a: `[*batch, M, K]`, int8.
      b: `[*batch, K, N]`, int8 or int4.
      last: whether `b` is `[*batch, N, K]` instead.

    Returns:
      `[*batch, M, N]`, float32, of sums in int32: one, or those of parts as in `integer_dot`.

    Example:
      >>> a = jnp.array([[1, 2], [3, 4]], jnp.int8)
      >>> print(transposed_dot(a.T, a))
      [[10. 14.]
       [14. 20.]]
    """
    if (parts := exact_parts(a.shape[-1], a.dtype, b.dtype)) > 1:
        b = in_parts(b, -1 if last else -2, 1, parts)
        return transposed_dot(in_parts(a, -1, 1, parts), b, last=last).sum(-3)

    def product(a, b):
        batch = tuple(range(a.ndim - 2))
        dims = ((a.ndim - 1,), (b.ndim - (1 if last else 2),)), (batch, batch)
        return lax.dot_general(a, b, dims, preferred_element_type=jnp.int32)

    def of_int8(a, b):
        return product(a, b.astype(jnp.int8))

    def in_rows(a, b):
        padded = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, 1)])
        return of_int8(lax.optimization_barrier(padded)[..., :-1], b)

    return on_each_platform({"cpu": in_rows, "tpu": product}, of_int8, a, b).astype(jnp.float32)
