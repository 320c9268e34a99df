"""Trees of everything that a checkpoint can hold, and how what comes back is compared."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_compress as jc
from tests.array_contract import LEAVES

DTYPES = (
    "bool int2 uint2 int4 uint4 int8 uint8 int16 uint16 int32 uint32 bfloat16 float16 float32 "
    "complex64 float4_e2m1fn float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn "
    "float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
).split()
HOST_DTYPES = [*DTYPES, "int64", "uint64", "float64", "complex128", "float6_e2m3fn", "int1"]


def values(dtype, *shape):
    """Every bit pattern that the width has, for dtypes of one byte or less."""
    dtype, count = np.dtype(dtype), int(np.prod(shape))
    if dtype.kind == "b":
        return (np.arange(count) % 3 == 0).reshape(shape)
    if dtype.itemsize > 1 or jnp.issubdtype(dtype, jnp.integer):
        return np.arange(count).reshape(shape).astype(dtype)
    bits = jnp.finfo(dtype).bits
    return (np.arange(count) % 2**bits).astype(np.uint8).view(dtype).reshape(shape)


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert type(a) is type(b)
        if not hasattr(b, "dtype"):
            assert repr(a) == repr(b)
            continue
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def everything():
    rng = np.random.default_rng(0)
    dense = {"w": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)}
    nested = jc.compress(dense, jc.chain(jc.low_rank(rank=4), jc.quantize("int4")))
    return {
        "leaves": {leaf.name: leaf.example().leaf for leaf in LEAVES},
        "nested": (nested, [nested["w"], None], ()),
        "jax": {d: jnp.asarray(values(d, 3, 7)) for d in DTYPES},
        "numpy": {d: values(d, 3, 8) for d in HOST_DTYPES},
        "scalars": [True, -3, 10**40, 0.1, float("-inf"), 1 - 2j, "text", np.float16(2), {}],
        "empty": [np.zeros((0, 3), np.int64), jnp.zeros((2, 0), jnp.int4)],
        "rank0": [np.array(1.5), jnp.array(3, jnp.int4), np.array(2, np.int64)],
        "key": jax.random.key(7),
    }
