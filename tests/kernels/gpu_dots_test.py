"""What the GPU kernels take, how they cut it, and what they are lowered to."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxopt_compress.kernels.decoded import decoded_first
from jaxopt_compress.kernels.gpu_dots import decoded_dot, fits, integer_dot, integer_fits
from jaxopt_compress.numerics.packing import pack
from tests.kernels.decoded_test import assert_close, convert, inputs


def test_what_does_not_fit_is_refused():
    x, codes, scale, keywords, _ = inputs("nf4")
    assert fits(x, codes, scale, 128)
    assert fits(x.astype(jnp.float16), codes.astype(jnp.int4), scale, 128)
    assert not fits(x.astype(jnp.float32), codes, scale, 128)
    assert not fits(x, codes.astype(jnp.int16), scale, 128)
    assert not fits(x, codes[:, :100], scale[:, :100], 128)
    assert not fits(x, codes, scale[:, :1], 128)
    assert not fits(x, codes, scale, 100)
    assert not fits(x[:0], codes, scale, 128)
    x, words, scale, _, _ = inputs("int3")
    assert fits(x, words, scale, 128, bits=3, block=128)
    assert not fits(x, words, scale, 128, bits=3, block=96)
    with pytest.raises(ValueError, match=r"no tiles for x bfloat16\[3, 500\]"):
        decoded_dot(x[:, :500], codes, scale, **keywords)


WIDTHS = [pytest.param(n, marks=[] if n in (1, 3, 6) else pytest.mark.slow) for n in range(1, 8)]


@pytest.mark.ci
@pytest.mark.fast("512-256-3", "512-256-6", "128-64-1", "128-64-5", "32-32-2", "32-32-7")
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group, block", [(512, 256), (128, 64), (32, 32)])
def test_words_of_all_widths(bits, group, block):
    """Runs of 128 entries down to 4, which one step takes from several blocks and groups."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(2**bits, size=(512, 64)).astype(np.uint8)
    words = pack(jnp.asarray(codes), bits, 0, block)
    x = jnp.asarray(rng.normal(size=(3, 512)), jnp.bfloat16)
    scale = rng.uniform(0.5, 2.0, size=(512 // group, 64)).astype(np.float32)
    given = {"group": group, "bits": bits, "block": block, "interpret": True}
    y = decoded_dot(x, words, jnp.asarray(scale), convert, **given)
    weight = codes * np.repeat(scale, group, axis=0)
    # With one step per column nothing is rounded but the sum, and its product with the step.
    weight = weight.astype(np.float64 if group == 512 else ml_dtypes.bfloat16)
    assert_close(y, x, weight)


@pytest.mark.fast("bfloat16-1", "bfloat16-129", "float16-33", "float16-520")
@pytest.mark.parametrize("rows", [1, 16, 33, 129, 300, 520])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_any_number_of_rows_and_both_short_types(rows, dtype):
    x, codes, scale, keywords, _ = inputs("nf4", rows, 256, 128)
    x = x.astype(dtype)
    y = decoded_dot(x, codes, scale, **keywords, interpret=True)
    want = decoded_first(x, codes, scale, **keywords)
    assert y.shape == (rows, 128)
    atol = 256 * 2.0**-24 * float(jnp.abs(want).max() * 16)
    np.testing.assert_allclose(y, want, rtol=0, atol=atol)


def test_integers_that_do_not_fit_are_refused():
    x, codes, scale = jnp.ones((3, 128), jnp.int8), jnp.ones((128, 64), jnp.int8), jnp.ones((2, 64))
    assert integer_fits(x, codes, scale, 64)
    assert not integer_fits(x, codes.astype(jnp.uint8), scale, 64)
    assert not integer_fits(x.astype(jnp.int4), codes, scale, 64)
    assert not integer_fits(x, codes, jnp.ones((8, 64)), 16)
    deep = [jax.ShapeDtypeStruct(s, jnp.int8) for s in ((3, 2**17), (2**17, 64))]
    assert integer_fits(*deep, jax.ShapeDtypeStruct((2, 64), jnp.float32), 2**16)
    # Int32 would not hold the sum.
    assert not integer_fits(*deep, jax.ShapeDtypeStruct((1, 64), jnp.float32), 2**17)
    with pytest.raises(ValueError, match=r"no tiles for x int8\[3, 128\], codes uint8"):
        integer_dot(x, codes.astype(jnp.uint8), scale, group=64)


@pytest.mark.parametrize(
    "dtype, layers, read_in_place",
    [("int8", 15, True), ("int8", 16, False), ("int8", 33, True), ("int4", 33, False)],
)
def test_what_triton_would_count_wrongly_is_cut_out_of_its_stack(dtype, layers, read_in_place):
    """From 2^31 bytes on positions are negative to it, and from 2^32 on of 64 bits."""
    x, codes, scale = (
        jax.ShapeDtypeStruct(*given)
        for given in (
            ((8, 2**14), jnp.bfloat16),
            ((layers, 2**14, 2**13), dtype),
            ((layers, 2**7, 2**13), jnp.float32),
        )
    )
    product = lambda x, codes, scale, i: decoded_dot(x, codes, scale, convert, group=128, layer=i)
    jaxpr = jax.make_jaxpr(product)(x, codes, scale, 0)
    assert ("dynamic_slice" not in str(jaxpr)) == read_in_place
