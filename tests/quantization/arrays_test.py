"""Quantizing one array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from tests.quantization import cases
from tests.quantization.cases import assert_same_bits, normal

pytestmark = pytest.mark.ci


@pytest.mark.parametrize("name", ["int8", "nf4", "mxfp4"])
def test_quantize_array(name):
    """As a parameter is, with one code per entry; the same under jit."""
    x = normal(64, 8).at[:, 3].set(0)
    got = jc.quantize_array(x, name, axis=0)
    want = jc.compress({"w": x}, cases.quantize(name))["w"]
    assert got.shape == x.shape and got.codes.shape == x.shape
    assert_same_bits(got.materialize(), want.materialize())
    assert got.nbytes == want.nbytes
    # Rows of a group may be cut short, as in a cache of any length.
    short = jc.quantize_array(x[:50], name, 0, 16)
    padded = jc.compress({"w": x[:50]}, cases.quantize(name, group_size=16, pad=True))["w"]
    assert_same_bits(short.materialize(), padded.materialize())


def test_quantize_array_under_jit():
    x = normal(4, 6, 32)
    run = lambda x: jc.quantize_array(x, "int4", (-1, -3), 8, symmetric=False)
    got, want = jax.jit(run)(x), run(x)
    # Whole along the first axis, in groups along the last.
    assert got.scale.shape == (1, 6, 4)
    assert_same_bits(got, want)


@pytest.mark.fast(
    "int8-nan",
    "uint5-inf",
    "float8_e4m3fn--inf",
    "float6_e2m3fn-nan",
    "nf4-inf",
    "nvfp4-nan",
    "binary--inf",
    "mxfp4-inf",
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [*cases.SOME, "uint4", "binary", "mxfp4", "mxfp8"])
def test_what_is_not_finite_shows_in_all_that_shares_its_step(name, value):
    """And nowhere else: a cache says so, rather than holding a number that nobody wrote."""
    x = normal(4, 64).at[1, 5].set(value)
    run = lambda x: jc.quantize_array(x, name, symmetric=not name.startswith("uint"))
    for got in (run(x), jax.jit(run)(x)):
        nans = np.isnan(got.materialize())
        group = 64 if got.group_size is None else got.group_size
        assert nans[1, 5 // group * group :][:group].all()
        assert not nans[[0, 2, 3]].any()


CACHES = {
    "int8": {},
    "nf4": {},
    "nvfp4": {},
    "int4": {"group_size": 4, "scale_dtype": "float8_e4m3fn"},
}


@pytest.mark.fast("int8", "nvfp4")
@pytest.mark.parametrize("name", CACHES)
def test_rows_written_into_a_cache(name):
    """One update, mapped over the fields, replaces rows and leaves the others as they are."""
    make = lambda x: jc.quantize_array(x, name, **CACHES[name])
    cache, rows = make(normal(2, 8, 16)), make(100 * normal(2, 3, 16))
    write = lambda a, b: jax.lax.dynamic_update_slice(a, b, (0, 4, 0))
    got = jax.jit(lambda a, b: jax.tree.map(write, a, b))(cache, rows)
    want = np.array(cache.materialize())
    want[:, 4:7] = rows.materialize()
    assert_same_bits(got.materialize(), want)


def test_same_steps_under_vmap():
    """Steps of a stack that is mapped over have the bits of those of each entry."""
    x = normal(4, 6, 32)
    run = lambda x: jc.quantize_array(x, "int8", -1)
    want = np.abs(np.asarray(x)).max(-1, keepdims=True) / np.float32(127.5)
    for got in (run(x), jax.vmap(run)(x), jax.jit(jax.vmap(run))(x)):
        np.testing.assert_array_equal(got.scale, want)


@pytest.mark.parametrize(
    ("args", "given", "message"),
    [
        (("int8", 2), {}, r"axis=2 of an array of shape \(6, 3\)"),
        (("int8", ()), {}, r"axis=\(\) of an array of shape \(6, 3\)"),
        (("int9",), {}, "unknown number format 'int9'"),
        (("nf4",), {"symmetric": False}, "'nf4' has no zero point"),
    ],
)
def test_quantize_array_errors(args, given, message):
    with pytest.raises(ValueError, match=message):
        jc.quantize_array(jnp.ones((6, 3)), *args, **given)
