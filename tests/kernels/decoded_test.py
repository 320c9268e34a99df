"""The kernels that decode a weight on its way, step by step on CPU, against a float64 reference.

`KERNELS` joins a kernel to all of it.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxopt_compress.kernels import gpu_dots, tpu_dots
from jaxopt_compress.kernels.decoded import decoded_first
from jaxopt_compress.numerics.codebooks import NF4
from jaxopt_compress.numerics.minifloats import Minifloat
from jaxopt_compress.numerics.packing import pack

pytestmark = pytest.mark.ci

KERNELS = {
    "tpu": tpu_dots.decoded_dot,
    "gpu": gpu_dots.decoded_dot,
    "gpu, without tables": functools.partial(gpu_dots.decoded_dot, lookup=False),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
PATTERNS = {16: ml_dtypes.float4_e2m1fn, 64: ml_dtypes.float6_e2m3fn}


def convert(codes):
    return codes.astype(jnp.float32)


def sign_extend(codes):
    return ((codes.astype(jnp.int32) ^ 4) - 4).astype(jnp.float32)


def patterns(count):
    return np.arange(count, dtype=np.uint8).view(PATTERNS[count]).astype(np.float32)


def floats(dtype):
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    return np.where(np.isfinite(values), values, 0)


# How codes are held, bits of planar words, group, decode, and the levels of codes 0, 1, ...
FORMATS = {
    "nf4": ("uint4", None, 128, NF4.decode, np.asarray(NF4.levels, np.float32)),
    "int4": ("int4", None, 32, convert, np.float32([*range(8), *range(-8, 0)])),
    "nf4, large groups": ("uint4", None, 512, NF4.decode, np.asarray(NF4.levels, np.float32)),
    "mxfp4": ("uint4", None, 32, Minifloat(2, 1, 6.0).decode, patterns(16)),
    "nvfp4": ("uint4", None, 16, Minifloat(2, 1, 6.0).decode, patterns(16)),
    "mxfp8": ("float8_e4m3fn", None, 32, convert, floats(ml_dtypes.float8_e4m3fn)),
    "mxfp8_e5m2": ("float8_e5m2", None, 32, convert, floats(ml_dtypes.float8_e5m2)),
    "mxfp6 in bytes": ("uint8", None, 32, Minifloat(2, 3, 7.5).decode, patterns(64)),
    "mxfp6": ("uint8", 6, 32, Minifloat(2, 3, 7.5).decode, patterns(64)),
    "int3": ("uint8", 3, 128, sign_extend, np.float32([0, 1, 2, 3, -4, -3, -2, -1])),
}
# What steps are held as; others in float32.
STEPS = dict.fromkeys(("mxfp4", "mxfp8", "mxfp8_e5m2", "mxfp6"), ml_dtypes.float8_e8m0fnu)
STEPS |= {"nvfp4": ml_dtypes.float8_e4m3fn, "int3": ml_dtypes.bfloat16}


def inputs(name, rows=3, depth=None, columns=256, seed=0):
    """`x`, stored codes, steps, keywords for the product, and the weight that it rounds to."""
    dtype, bits, group, decode, levels = FORMATS[name]
    depth = depth or max(512, 2 * group)  # Steps of whole columns may be applied to the sums.
    rng = np.random.default_rng(seed)
    codes = rng.integers(len(levels), size=(depth, columns)).astype(np.uint8)
    x = jnp.asarray(rng.normal(size=(rows, depth)), jnp.bfloat16)
    scale = rng.uniform(0.5, 2.0, size=(depth // group, columns))
    scale = scale.astype(STEPS.get(name, np.float32))
    weight = (levels[codes] * np.repeat(scale.astype(np.float32), group, axis=0)).astype(
        ml_dtypes.bfloat16
    )
    keywords = {"decode": decode, "group": group}
    if bits is not None:
        stored = pack(jnp.asarray(codes), bits, 0, group)
        keywords |= {"bits": bits, "block": group}
    elif dtype.startswith("float8"):
        stored = jnp.asarray(levels[codes], dtype)
    else:
        stored = jnp.asarray(codes, dtype)
    return x, stored, jnp.asarray(scale), keywords, weight


def assert_close(y, x, weight):
    """Sums of K exact products, in any order, err by K unit roundoffs of float32 at most."""
    x, weight = np.asarray(x, np.float64), weight.astype(np.float64)
    assert y.dtype == jnp.float32
    bound = x.shape[-1] * 2.0**-24 * (np.abs(x) @ np.abs(weight))
    assert np.all(np.abs(np.asarray(y, np.float64) - x @ weight) <= bound)


@pytest.mark.fast("nf4-tpu", "int3-tpu", "mxfp8-gpu", "int4-gpu, without tables")
@every_kernel
@pytest.mark.parametrize("name", FORMATS)
def test_equals_reference(kernel, name):
    x, codes, scale, keywords, weight = inputs(name)
    assert_close(kernel(x, codes, scale, **keywords, interpret=True), x, weight)
    assert_close(decoded_first(x, codes, scale, **keywords), x, weight)


@pytest.mark.fast("last rows, which find columns decoded-gpu")
@every_kernel
@pytest.mark.parametrize(
    "rows, depth, columns",
    [(17, 768, 1280), (1040, 2048, 256)],
    ids=["last columns and many blocks of K", "last rows, which find columns decoded"],
)
def test_ragged_blocks(kernel, rows, depth, columns):
    x, codes, scale, keywords, weight = inputs("mxfp8", rows, depth, columns)
    product = functools.partial(kernel, **keywords, interpret=True)
    assert_close(product(x, codes, scale), x, weight)
    assert_close(product(x, codes.mT, scale.mT, transposed=True), x, weight)


@every_kernel
def test_result_has_the_type_asked_for(kernel):
    x, codes, scale, keywords, _ = inputs("mxfp8")
    product = functools.partial(kernel, x, codes, scale, **keywords, interpret=True)
    y = product(preferred=jnp.bfloat16)
    np.testing.assert_array_equal(y, product().astype(jnp.bfloat16))


def in_stack(name):
    """`x`, three layers of codes and steps, keywords, and one layer's arguments by its number."""
    members = [inputs(name, seed=seed) for seed in range(3)]
    x, keywords = members[0][0], members[0][3]
    codes, scale = (jnp.stack([m[i] for m in members]) for i in (1, 2))
    return x, codes, scale, keywords, lambda i: (x, codes[i], scale[i])


@pytest.mark.fast("nf4-tpu", "int3-gpu", "mxfp8-tpu", "nvfp4-gpu, without tables")
@every_kernel
@pytest.mark.parametrize(
    "name",
    [
        "nf4",
        "mxfp4",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("nvfp4", "mxfp8", "int3")),
    ],
)
def test_layers_are_read_where_they_lie(kernel, name):
    x, codes, scale, keywords, of = in_stack(name)
    product = functools.partial(kernel, **keywords, interpret=True)
    read = jax.jit(lambda i: product(x, codes, scale, layer=i))
    for i in range(3):
        np.testing.assert_array_equal(read(i), product(*of(i)))
        # Steps that have been cut out, and several rows beyond those that are widened in place.
        many = jnp.tile(x, (16, 1))
        got = product(many, codes, scale[i][None], layer=i)
        np.testing.assert_array_equal(got, product(many, *of(i)[1:]))


@pytest.mark.ci
@pytest.mark.fast("nf4-tpu", "int3-gpu")
@every_kernel
@pytest.mark.parametrize("name", FORMATS)
def test_transposed(kernel, name):
    x, codes, scale, keywords, weight = inputs(name, depth=1024)
    turned = (x, codes.mT, scale.mT)
    for product in (functools.partial(kernel, interpret=True), decoded_first):
        assert_close(product(*turned, **keywords, transposed=True), x, weight)
    # With one step for a column, too, of which kernels may read a row.
    keywords["group"] = 1024
    got = kernel(x, codes.mT, scale[:1].mT, **keywords, transposed=True, interpret=True)
    want = np.float64(decoded_first(x, codes, scale[:1], **keywords))
    np.testing.assert_allclose(got, want, rtol=0, atol=2.0**-8 * np.abs(want).max())


@pytest.mark.ci
@pytest.mark.fast("gpu")
@every_kernel
def test_transposed_layers(kernel):
    x, codes, scale, keywords, _ = in_stack("mxfp4")
    product = functools.partial(kernel, **keywords, transposed=True, interpret=True)
    codes, scale = codes.mT, scale.mT
    for i in (0, 2):
        want = product(x, codes[i], scale[i])
        np.testing.assert_array_equal(product(x, codes, scale, layer=i), want)
    twice = lambda a, axis=1: jnp.stack([a, a[..., ::-1, :]], axis)
    got = product(twice(x, 0), twice(codes), twice(scale), layer=1)
    np.testing.assert_array_equal(got, product(twice(x, 0), twice(codes)[1], twice(scale)[1]))
    each = jax.vmap(product, (None, 0, 0))(x, codes, scale)
    np.testing.assert_array_equal(each[2], want)


@pytest.mark.ci
@pytest.mark.fast("tpu", "gpu")
@every_kernel
def test_layers_of_batches(kernel):
    x, codes, scale, keywords, _ = in_stack("nvfp4")
    several = lambda a: jnp.stack([a, a[::-1]], axis=1)
    x, codes, scale = jnp.stack([x, x[::-1]]), several(codes), several(scale)
    product = functools.partial(kernel, **keywords, interpret=True)
    got = product(x, codes, scale, layer=2)
    np.testing.assert_array_equal(got, product(x, codes[2], scale[2]))


@pytest.mark.ci
@pytest.mark.fast("tpu", "gpu")
@every_kernel
def test_vmap_of_layers(kernel):
    x, codes, scale, keywords, of = in_stack("mxfp8")
    product = functools.partial(kernel, **keywords, interpret=True)
    layered = lambda x, codes, scale, i: product(x, codes, scale, layer=i)
    want = product(*of(1))
    shared = jax.vmap(layered, (0, None, None, None))(jnp.stack([x, 2 * x]), codes, scale, 1)
    np.testing.assert_array_equal(shared, jnp.stack([want, 2 * want]))
    members = jax.vmap(layered, (None, 0, 0, None))
    both = members(x, jnp.stack([codes, codes]), jnp.stack([scale, 2 * scale]), 1)
    np.testing.assert_array_equal(both, jnp.stack([want, 2 * want]))
    each = jax.vmap(layered, (None, None, None, 0))(x, codes, scale, jnp.array([2, 0]))
    np.testing.assert_array_equal(each, jnp.stack([product(*of(2)), product(*of(0))]))


@pytest.mark.fast("tpu", "gpu")
@every_kernel
def test_derivatives_of_layers(kernel):
    x, codes, scale, keywords, _ = in_stack("nf4")
    product = lambda x, scale: kernel(x, codes, scale, **keywords, layer=1, interpret=True)
    plain = lambda x, scale: decoded_first(x, codes[1], scale[1], **keywords)
    y, pull = jax.vjp(product, x, scale)
    for pulled, expected in zip(pull(y), jax.vjp(plain, x, scale)[1](y), strict=True):
        np.testing.assert_array_equal(pulled, expected)


@every_kernel
def test_vmap(kernel):
    members = [inputs("mxfp8", seed=seed) for seed in (0, 1)]
    x, codes, scale = (jnp.stack(field) for field in list(zip(*members, strict=True))[:3])
    product = functools.partial(kernel, **members[0][3], interpret=True)
    both = jax.vmap(product)(x, codes, scale)
    shared = jax.vmap(product, (0, None, None))(x, codes[0], scale[0])
    np.testing.assert_array_equal(product(x, codes, scale), both)
    for i in (0, 1):
        assert_close(both[i], x[i], members[i][4])
        assert_close(shared[i], x[i], members[0][4])


@every_kernel
def test_derivatives_are_those_without_a_kernel(kernel):
    x, codes, scale, keywords, _ = inputs("nf4")
    product = lambda x, scale: kernel(x, codes, scale, **keywords, interpret=True)
    plain = lambda x, scale: decoded_first(x, codes, scale, **keywords)
    tangents = (jnp.ones_like(x), scale)
    y, tangent = jax.jvp(product, (x, scale), tangents)
    np.testing.assert_array_equal(tangent, jax.jvp(plain, (x, scale), tangents)[1])
    for pulled, expected in zip(
        jax.vjp(product, x, scale)[1](y), jax.vjp(plain, x, scale)[1](y), strict=True
    ):
        np.testing.assert_array_equal(pulled, expected)
