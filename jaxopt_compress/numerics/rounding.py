"""Making a value round where the program says so, whatever it is fused with."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def seal(x: jax.Array, dtype) -> jax.Array:
    """Converts to ``dtype`` and keeps the compiler from computing around that rounding.

    XLA may carry a bfloat16 intermediate in float32 through a fusion, and may contract a product
    and the sum that consumes it into one rounding. A compressed parameter has to mean the same
    number in every program, so 16-bit floats are rounded by arithmetic that leaves nothing to the
    conversion, and others end in an optimization barrier. The derivative is that of a conversion.

    Args:
        x: Floats, any shape; narrower ones than float32 are widened first.
        dtype: The floating dtype of the result.

    Returns:
        ``x`` in ``dtype``.

    Example:
        >>> import jax.numpy as jnp
        >>> print(seal(jnp.array([1 / 3, 1e-6]), jnp.float16))
        [3.333e-01 1.013e-06]
    """
    return _seal(x, jnp.dtype(dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _seal(x: jax.Array, dtype: np.dtype) -> jax.Array:
    if dtype.itemsize > 2:
        return lax.optimization_barrier(x.astype(dtype))
    info = jnp.finfo(dtype)
    # The inverse of the smallest step is infinite in float16.
    x = x.astype(promoted(x.dtype, jnp.float32))
    rounded = lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    if info.nexp < jnp.finfo(jnp.float32).nexp:
        # reduce_precision would make them zeros; they are the multiples of the smallest one.
        step = float(info.smallest_subnormal)
        below = jnp.abs(x) < float(info.smallest_normal)
        rounded = jnp.where(below, jnp.round(x * (1 / step)) * step, rounded)
    return rounded.astype(dtype)


@_seal.defjvp
def _seal_jvp(dtype, primals, tangents):
    return _seal(primals[0], dtype), tangents[0].astype(dtype)


def promoted(*dtypes: Any) -> jnp.dtype:
    """As `jax.numpy.promote_types`, in strict mode too: for what a product sums in, by design.

    Example:
        >>> import jax.numpy as jnp
        >>> with jax.numpy_dtype_promotion("strict"):
        ...     print(promoted(jnp.bfloat16, jnp.float16, jnp.float32))
        float32
    """
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, map(jnp.dtype, dtypes))


@jax.custom_jvp
def widen(x: jax.Array) -> jax.Array:
    """Converts to float32 the number that ``x`` holds, not one that it was rounded from.

    XLA may drop the rounding of a bfloat16 intermediate that is converted back, and then keeps the
    float32 one in memory, of twice the size. Reading its bits leaves nothing to drop.

    Args:
        x: Floats, any shape.

    Returns:
        Float32. The derivative is that of a conversion.

    Example:
        >>> import jax.numpy as jnp
        >>> print(widen(jnp.array([1 / 3], jnp.bfloat16)))
        [0.33398438]
    """
    if x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32)
    bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(bits, jnp.float32)


@widen.defjvp
def _widen_jvp(primals, tangents):
    return widen(*primals), tangents[0].astype(jnp.float32)
