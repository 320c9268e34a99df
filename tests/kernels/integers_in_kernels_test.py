"""The kernels in which integers meet integers, step by step on CPU, against exact sums.

`KERNELS` joins a kernel to all of it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_compress.kernels import gpu_dots, tpu_dots
from tests.kernels.products import integer_dot

pytestmark = pytest.mark.ci

KERNELS = {"tpu": tpu_dots.integer_dot, "gpu": gpu_dots.integer_dot}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def operands(dtype, rows, group, depth=512):
    """Two products, of steps that are powers of two, so that sums over groups are exact as well."""
    rng = np.random.default_rng(0)
    kind = jnp.iinfo(dtype)
    x = jnp.asarray(rng.integers(-128, 128, size=(2, rows, depth)), jnp.int8)
    codes = jnp.asarray(rng.integers(int(kind.min), int(kind.max) + 1, size=(2, depth, 256)), dtype)
    scale = 2.0 ** jnp.asarray(rng.integers(-1, 2, size=(2, depth // group, 256)), jnp.float32)
    return x, codes, scale


@every_kernel
@pytest.mark.parametrize("dtype", [jnp.int4, jnp.int8])
@pytest.mark.parametrize("rows, group", [(1, 128), (40, 128), (3, 512), (40, 256)])
@pytest.mark.fast("1-128-int4-tpu", "3-512-int8-gpu", "40-128-int8-tpu")
def test_sums_are_exact(kernel, dtype, rows, group):
    x, codes, scale = operands(dtype, rows, group)
    product = functools.partial(kernel, group=group, interpret=True)
    turned = functools.partial(product, transposed=True)
    want = integer_dot(x, codes, scale, group=group)
    np.testing.assert_array_equal(product(x, codes, scale), want)
    np.testing.assert_array_equal(turned(x, codes.mT, scale.mT), want)
    np.testing.assert_array_equal(jax.vmap(product)(x, codes, scale), want)
    shared = jax.vmap(product, (0, None, None))(x, codes[0], scale[0])
    np.testing.assert_array_equal(shared[0], want[0])


@every_kernel
def test_layers(kernel):
    x, codes, scale = operands(jnp.int4, 3, 128)
    want = integer_dot(x, codes, scale, group=128)
    product = functools.partial(kernel, group=128, interpret=True)
    layer = jax.jit(lambda i: product(x[i], codes, scale, layer=i))
    turned = jax.jit(lambda i: product(x[i], codes.mT, scale.mT, layer=i, transposed=True))
    for i in (0, 1):
        np.testing.assert_array_equal(layer(i), want[i])
        np.testing.assert_array_equal(turned(i), want[i])


@every_kernel
def test_blocks_of_rows_columns_and_k(kernel):
    x, codes, scale = operands(jnp.int8, 1040, 128, depth=2048)
    x, codes, scale = x[0], codes[0].repeat(5, axis=1), scale[0].repeat(5, axis=1)
    want = integer_dot(x, codes, scale, group=128)
    got = kernel(x, codes, scale, group=128, interpret=True)
    np.testing.assert_array_equal(got, want)
    got = kernel(x, codes.mT, scale.mT, group=128, transposed=True, interpret=True)
    np.testing.assert_array_equal(got, want)


def test_what_does_not_fit_a_tpu_is_refused():
    x, codes, scale = (a[0] for a in operands(jnp.int8, 3, 128))
    assert tpu_dots.integer_fits(x, codes, scale, 128)
    assert not tpu_dots.integer_fits(x, codes.astype(jnp.uint8), scale, 128)
    assert not tpu_dots.integer_fits(x.astype(jnp.int4), codes, scale, 128)
    assert not tpu_dots.integer_fits(x, codes, scale.repeat(2, axis=0), 64)
    with pytest.raises(ValueError, match=r"no tiles for x int8\[3, 512\], codes uint8"):
        tpu_dots.integer_dot(x, codes.astype(jnp.uint8), scale, group=128)
