"""Examples of arrays of codes: of levels with steps, and of codebooks."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxopt_compress.arrays import CodebookArray, QuantizedArray
from jaxopt_compress.arrays.codebook import code_bits, code_dtype
from jaxopt_compress.numerics.codebooks import NF4
from jaxopt_compress.numerics.formats import format_of
from jaxopt_compress.numerics.packing import pack
from tests.arrays.example import Example, K, N, normal


def quantized(shape, fmt, axis, scale_shape, *, dtype="float32", keep=None, **static):
    """Codes in the dtype of their format, in words with ``block``, under a mask with ``keep``."""
    of = format_of(fmt)
    bits, signed = of.bits, fmt.startswith("int")

    def build(rng, stack):
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
        if jnp.issubdtype(of.dtype, jnp.floating):
            high = 2 ** (bits - 1) - 8  # no NaNs
        raw = rng.integers(low, high, (*stack, *shape), np.int16)
        raw = raw.astype(np.int8 if signed else np.uint8)
        steps, scale = _steps(rng, (*stack, *scale_shape), static.get("steps", "float32"))
        zero = None
        if static.get("asymmetric"):
            zero = jnp.asarray(rng.integers(low, high, scale.shape), jnp.int8)
        group, block, tile = (static.get(k) for k in ("group", "block", "tile"))
        stored = jnp.asarray(raw)
        if jnp.issubdtype(of.dtype, jnp.floating):
            stored = jax.lax.bitcast_convert_type(stored, of.dtype)
        else:
            stored = stored.astype(of.dtype)
        mask = np.ones(raw.shape, bool)
        if block is not None:
            stored = pack(jnp.asarray(raw), bits, axis, block)
        if keep is not None:
            mask = keep.mask(rng, stack)
            stored = keep.store(stored, mask)

        def formula(*scale):
            wide = [steps(*scale), jnp.zeros(()) if zero is None else zero.astype(jnp.float32)]
            for at, size in ((axis, group), tile or (None, None)):
                if size is not None:
                    # The last group may be shorter.
                    take = np.arange(raw.shape[at]) // size
                    wide = [jnp.take(x, take, axis=at) if x.ndim else x for x in wide]
            levels = jnp.where(mask, _values(raw, fmt) - wide[1], 0.0)
            return (levels * wide[0]).astype(dtype)

        leaf = QuantizedArray(stored, scale, zero, jnp.dtype(dtype), fmt, axis, group, block, tile)
        return Example(leaf, formula)

    return build


def _values(raw, fmt):
    """The levels of codes, from another source than the package's."""
    if fmt == "nf4":
        return np.asarray(NF4.levels, np.float32)[raw]
    same = {"mxfp4": "float4_e2m1fn", "nvfp4": "float4_e2m1fn", "mxfp6": "float6_e2m3fn"}
    kind = same.get(fmt, fmt)
    if kind.startswith("float"):
        return raw.view(getattr(ml_dtypes, kind)).astype(np.float32)
    return raw.astype(np.float32)


def _steps(rng, shape, kind):
    """``(function of the float fields to float32 steps, stored steps)``."""
    floats = jnp.asarray(rng.uniform(0.01, 2.0, shape), jnp.float32)
    if kind == "float32":
        return lambda scale: scale, floats
    if kind == "bfloat16":
        return lambda scale: scale.astype(jnp.float32), floats.astype(kind)
    raw = rng.integers(120, 134, shape, np.uint8)
    if kind == "float8_e8m0fnu":
        stored = jax.lax.bitcast_convert_type(jnp.asarray(raw), jnp.float8_e8m0fnu)
        return lambda: 2.0 ** (raw.astype(np.float32) - 127), stored
    raw = rng.integers(8, 120, shape, np.uint8)
    codes = jax.lax.bitcast_convert_type(jnp.asarray(raw), jnp.float8_e4m3fn)
    outer = floats[..., :1, :1]
    stored = QuantizedArray(codes, outer, None, jnp.dtype("float32"), "float8_e4m3fn", None)
    return lambda outer: raw.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * outer, stored


def codebook(clusters, books, *, vector=1, dtype="float32", held="float32", **stored):
    """Codes of ``(K, N)`` along the first axis, and books that are shared along axes of size 1."""
    block, keep = stored.get("block"), stored.get("keep")

    def build(rng, stack):
        raw = rng.integers(0, clusters, (*stack, K // vector, N), np.uint16)
        shape = (*stack, books[0] * clusters * vector, books[1])
        centroids = normal(rng, *shape, dtype=held)
        codes = jnp.asarray(raw).astype(code_dtype(clusters))
        mask = np.ones((*stack, K, N), bool)
        if block is not None:
            codes = pack(jnp.asarray(raw.astype(np.uint8)), code_bits(clusters), -2, block)
        if keep is not None:
            mask = keep.mask(rng, stack)
            codes = keep.store(codes, mask)
        # Entry ``k`` is part ``k % vector`` of a vector of group ``k // (K / groups)``.
        k = np.arange(K)[:, None]
        at = (k // (K // books[0]) * clusters + np.repeat(raw, vector, -2)) * vector + k % vector

        def formula(centroids):
            table = jnp.broadcast_to(centroids, (*stack, shape[-2], N))
            values = jnp.take_along_axis(table, jnp.asarray(at, jnp.int32), -2)
            return jnp.where(mask, values.astype("float32"), 0).astype(dtype)

        leaf = CodebookArray(codes, centroids, jnp.dtype(dtype), clusters, -2, vector, block)
        return Example(leaf, formula)

    return build
