"""Sums of arrays in several forms, in lifted functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.arrays.sparse import sparse_rows

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def summed(shape, stack=0, dense=False):
    """Thin factors and half of the entries; with ``dense`` an array and a quantized one."""
    if dense:
        scale = jnp.asarray(RNG.uniform(0.01, 0.02, (*shape[:stack], *(1,) * (len(shape) - stack))))
        codes = jnp.asarray(RNG.integers(-128, 128, shape), jnp.int8)
        scale = scale.astype(jnp.float32)
        codes = jc.QuantizedArray(codes, scale, None, jnp.dtype("float32"), "int8", -2)
        return jc.SumArray((normal(*shape), codes))
    *left, right = shape[stack:]
    u = normal(*shape[:stack], *left, 2)
    v = normal(*shape[:stack], *(1,) * (len(left) - 1), 2, right)
    mask = jnp.asarray(RNG.random(shape) < 0.5)
    return jc.SumArray(
        (
            jc.LowRankArray(u, v, jnp.dtype("float32")),
            sparse_rows(normal(*shape), mask, len(shape) - stack),
        )
    )


ROW = normal(5, 8)
CONVOLUTION = lambda p, x: jax.lax.conv_general_dilated(
    x, p, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
)

# The function, its weight's shape and stack axes, and what it meets.
CASES = {
    "product": (lambda p, x: x @ p, (8, 6), 0, ROW),
    "transposed": (lambda p, x: x @ p.T, (6, 8), 0, ROW),
    "half": (lambda p, x: x[:, :4] @ p[:4], (8, 6), 0, ROW),
    "bfloat16": (lambda p, x: x @ p.astype(jnp.bfloat16), (8, 6), 0, ROW),
    "times a number": (lambda p, x: x @ (p * 0.5), (8, 6), 0, ROW),
    "lookup": (lambda p, i: p[i], (6, 8), 0, jnp.array([0, 5, 2])),
    "scan": (
        lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p)[0],
        (3, 8, 8),
        1,
        ROW,
    ),
    "experts": (
        lambda p, x: jax.lax.ragged_dot(x, p, jnp.array([2, 3, 0], jnp.int32)),
        (3, 8, 4),
        1,
        ROW,
    ),
    "convolution": (CONVOLUTION, (3, 3, 4, 6), 0, normal(2, 5, 5, 4)),
}


@pytest.mark.fast("product-False", "convolution-True")
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_each_part_runs_in_its_own_form(name, dense):
    fn, shape, stack, x = CASES[name]
    w = summed(shape, stack, dense)
    got = jax.jit(jc.lift(fn, on_fallback="error"))(w, x)
    want = fn(w.materialize(), x)
    # Casting rounds the parts, and then their sum, to 8 bits.
    tolerance = 2e-2 * np.abs(want).max() if name == "bfloat16" else 2e-5
    np.testing.assert_allclose(got, want, atol=tolerance)


@pytest.mark.parametrize("name", ["convolution", "experts"])
def test_products_of_parts_that_cancel_are_added_before_they_are_rounded(name):
    fn, shape, _, x = CASES[name]
    large, small = (w.astype(jnp.bfloat16) for w in (16 * normal(*shape), normal(*shape)))
    part = jc.QuantizedArray(
        *(jnp.ones(shape, jnp.int8), jnp.ones((1,) * len(shape)), None),
        *(jnp.dtype("bfloat16"), "int8", -2),
    )
    w = jc.SumArray((large, (small - large), part))
    x = x.astype(jnp.bfloat16)
    got = jax.jit(jc.lift(fn, on_fallback="error"))(w, x)
    exact = sum(p.astype(jnp.float32) for p in (large, small - large, jnp.ones(shape)))
    want = np.asarray(fn(exact, x.astype(jnp.float32)))
    # One rounding to 8 bits of the sum; the parts' products are 16 times as large.
    np.testing.assert_allclose(got.astype(np.float32), want, atol=2**-8 * np.abs(want).max())


def test_a_lookup_beyond_the_end_is_filled_once():
    w = summed((6, 8))
    fill = lambda value: lambda p, i: p.at[i].get(mode="fill", fill_value=value)
    rows = jnp.array([1, 7])
    got = jc.lift(fill(None), on_fallback="error")(w, rows)
    np.testing.assert_allclose(got, fill(None)(w.materialize(), rows), atol=1e-6)
    with pytest.warns(jc.FallbackWarning, match="'gather' has no rule for the SumArray"):
        got = jc.lift(fill(3.0))(w, rows)
    np.testing.assert_array_equal(got, fill(3.0)(w.materialize(), rows))


@pytest.mark.ci
def test_a_chain_quantizes_the_parts():
    params = {"w": summed((8, 6))}
    small = jc.compress(params, jc.quantize("int8"), layout="in,out")
    factors, sparse = small["w"].parts
    assert [type(x).__name__ for x in (factors.u, factors.v)] == ["QuantizedArray"] * 2
    # Codes of the kept entries alone, under the same mask.
    np.testing.assert_array_equal(sparse.codes.mask(), params["w"].parts[1].mask())
    dense = [jc.materialize(x)["w"] for x in (params, small)]
    np.testing.assert_allclose(dense[1], dense[0], atol=0.1)
    assert (
        jc.report(params, small)["leaves"][0]["method"] == "low rank 2 of int8 plus sparse + int8"
    )


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"parts of the shapes \[\(2, 3\), \(3, 2\)\]"):
        _ = jc.SumArray((jnp.ones((2, 3)), jnp.ones((3, 2)))).shape
    with pytest.raises(ValueError, match="they are of one floating dtype"):
        jc.SumArray((jnp.ones((2, 3)), jnp.ones((2, 3), jnp.bfloat16))).check()


def test_parts_in_float64_are_added_in_float64():
    with jax.enable_x64(True):
        w = jc.SumArray((jnp.array([[1.0]]), jnp.array([[2.0**-40]])))
        assert w.dtype == jnp.float64 and w.materialize()[0, 0] == 1 + 2.0**-40
