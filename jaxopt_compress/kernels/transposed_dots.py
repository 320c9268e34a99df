"""Products of a backward pass, whose operands are transposed."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxopt_compress.kernels.forms import on_each_platform
from jaxopt_compress.kernels.integer_dots import exact_parts, in_parts


def transposed_dot(a, b, *, last=False):
    """A product of int8 codes that may be transposed in memory, as those of a backward pass do.

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


def trained_dot(x, w, dims, precision=None, dtype=None):
    """`lax.dot_general` of an activation and a weight that is trained, with derivatives of both.

    The weight's is a product of `x^T`. XLA:CPU has a library for products of matrices whose rows
    lie one after the other, and leaves that of `x^T` to a slower one; of `x` with several leading
    axes it also copies both operands. With `x^T` written out, as rows, it takes 5 to 20% less time
    for 128 and 256 rows and widths of 512 and 2048.

    Args:
      x: floats.
      w: floats of the same type.
      dims: `((axes of x, axes of w), (batch axes of x, of w))`, summed and kept in step.
      precision: as in `lax.dot_general`.
      dtype: type of the result.

    Returns:
      As `lax.dot_general`.

    Example:
      >>> x, w = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0], [-1.0]])
      >>> rows = lambda w: trained_dot(x, w, (((1,), (0,)), ((), ())))
      >>> print(rows(w).T, jax.vjp(rows, w)[1](jnp.array([[1.0], [10.0]]))[0].T)
      [[-1. -1.]] [[31. 42.]]
    """
    (x_summed, w_summed), (batch, _) = dims

    def product(x, w):
        return lax.dot_general(x, w, dims, precision, dtype)

    def in_rows(x, w):
        rest = [d for d in range(x.ndim) if d not in x_summed]
        columns = [d for d in range(w.ndim) if d not in w_summed]
        depth = math.prod(w.shape[d] for d in w_summed)
        # Behind a barrier it is not folded into the product.
        turned = lax.optimization_barrier(x.transpose(*x_summed, *rest).reshape(depth, -1))
        matrix = w.transpose(*w_summed, *columns).reshape(depth, -1)
        y = lax.dot_general(turned, matrix, (((0,), (0,)), ((), ())), precision, dtype)
        return y.reshape([a.shape[d] for a, own in ((x, rest), (w, columns)) for d in own])

    def in_each_form(x, w):
        forms = {} if batch or x.dtype != jnp.float32 else {"cpu": in_rows}
        return on_each_platform(forms, product, x, w)

    # Platforms differ in the backward pass only: until then `x` is kept, once.
    of_weight = jax.checkpoint(in_each_form, prevent_cse=False)
    fn = jax.custom_jvp(product)

    def jvp(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        y, change = fn(x, w), []
        if not isinstance(dx, SymbolicZero):
            change.append(product(dx, w))
        if not isinstance(dw, SymbolicZero):
            change.append(of_weight(x, dw))
        return y, sum(change[1:], change[0])

    fn.defjvp(jvp, symbolic_zeros=True)
    return fn(x, w)
