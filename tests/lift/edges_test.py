"""Edges of lifted functions: lookups out of bounds, mixed dtypes, partly contracted factors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc

W = jax.random.normal(jax.random.key(0), (8, 8))
STACK = jax.random.normal(jax.random.key(1), (3, 8, 8))
X = jax.random.normal(jax.random.key(2), (4, 8))
# Float32 sums of eight products in two orders.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def both(fn, small, *args):
    """The lifted result, without fallback, and that of the dense weights."""
    return jc.lift(fn, on_fallback="error")(small, *args), fn(jc.materialize(small), *args)


@pytest.mark.parametrize("pattern", [None, pytest.param("2:4", marks=pytest.mark.slow)])
def test_asymmetric_codes_of_a_sparse_weight(pattern):
    c = jc.chain(
        jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), pattern),
        jc.quantize("int4", symmetric=False),
    )
    small = jc.compress({"w": W}, c)
    np.testing.assert_allclose(*both(lambda p, x: x @ p["w"] @ p["w"].T, small, X), **CLOSE)


@pytest.mark.parametrize(
    "compression",
    [
        jc.quantize("int8"),
        jc.quantize("int4", group_size=4),
        jc.quantize("int2"),
        jc.low_rank(rank=4),
    ],
    ids=["int8", "int4 groups", "int2", "low rank"],
)
@pytest.mark.parametrize(
    "mode, fill", [("fill", None), ("fill", -1.0), ("fill", 0.0), ("clip", None)]
)
def test_lookups_out_of_bounds(compression, mode, fill):
    small = jc.compress({"w": W}, compression)
    ids = jnp.array([0, 7, 8, 99, -1])
    look = lambda p, i: jnp.take(p["w"], i, axis=0, mode=mode, fill_value=fill)
    found, dense = (
        jc.lift(look, on_fallback="densify")(small, ids),
        look(jc.materialize(small), ids),
    )
    np.testing.assert_allclose(found, dense, **CLOSE)


@pytest.mark.filterwarnings("ignore::jaxopt_compress.AssumedLayout")
@pytest.mark.parametrize("format", ["int4", "int3", "nf4"])
def test_a_layer_of_a_stack_whose_last_group_is_short(format):
    stack = jax.random.normal(jax.random.key(1), (3, 40, 8))
    small = jc.compress({"w": stack}, jc.quantize(format, group_size=16, pad=True, where="w"))
    x = jax.random.normal(jax.random.key(2), (4, 40))
    for layer in (lambda p, x: x @ p["w"][1], lambda p, x: x @ p["w"].reshape(1, 3, 40, 8)[0, 2]):
        np.testing.assert_allclose(*both(layer, small, x), rtol=1e-4, atol=1e-4)
    with pytest.raises(jc.FallbackError, match="reshape"):
        both(lambda p, x: x @ p["w"].reshape(120, 8), small, jnp.ones((4, 120)))


def test_mapped_lookups_in_a_stack_of_one():
    small = jc.compress({"w": STACK[:1]}, jc.quantize("int4", group_size=4, where="w"))
    look = jax.vmap(lambda w, i: jnp.take(w, i, axis=1))
    found, dense = both(lambda p, i: look(p["w"], i), small, jnp.array([[1, 5]]))
    np.testing.assert_allclose(found, dense, **CLOSE)


@pytest.mark.filterwarnings("ignore::jaxopt_compress.AssumedLayout")
@pytest.mark.parametrize(
    "form, rows", [("bhd,hde->be", (2, 3, 8)), ("hd,hde->he", (3, 8)), ("bd,hde->bhe", (2, 8))]
)
def test_factors_of_a_stack_that_is_summed_over(form, rows):
    """Without uses, three axes are taken for a stack: results are right all the same."""
    small = jc.compress({"w": STACK}, jc.low_rank(rank=4))
    x = jax.random.normal(jax.random.key(3), rows)
    fn = lambda p, x: jnp.einsum(form, x, p["w"])
    found, dense = jc.lift(fn, on_fallback="densify")(small, x), fn(jc.materialize(small), x)
    np.testing.assert_allclose(found, dense, **CLOSE)


def test_small_scales_leave_float16_activations_in_range():
    w = (0.01 * jax.random.normal(jax.random.key(4), (64, 512))).astype(jnp.float16)
    x = (1e-3 * jax.random.normal(jax.random.key(5), (4, 512))).astype(jnp.float16)
    small = jc.compress({"w": w}, jc.quantize("int8"))
    found = jc.lift(lambda p, x: x @ p["w"].T)(small, x)
    exact = x.astype(jnp.float32) @ jc.materialize(small)["w"].T.astype(jnp.float32)
    # A few roundings to float16, of 2**-11 each.
    assert np.abs(found - exact).max() <= 4 * 2.0**-11 * np.abs(exact).max()


def test_what_only_a_replay_knows_comes_back_as_an_array():
    small = jc.compress({"w": W}, jc.quantize("int8"))
    joined = jc.lift(lambda p: jnp.concatenate([p["w"], p["w"]]))(small)
    assert isinstance(joined, jax.Array) and joined.shape == (16, 8)


def test_codes_that_were_treated_as_parameters_are_refused():
    small = jc.compress({"w": W}, jc.quantize("int8"))
    with pytest.raises(TypeError, match=r"float32 codes.*jaxopt_compress\.partition"):
        jc.materialize(jax.tree.map(lambda x: 0.9 * x, small))
    with pytest.raises(TypeError, match="int32 scales"):
        floats, rest = jc.partition(small)
        floats = jax.tree.map(lambda x: x.astype(jnp.int32), floats)
        jc.materialize(jc.combine(floats, rest))


@pytest.mark.parametrize(
    "c",
    [
        jc.quantize("int8", activations="int8"),
        jc.quantize("int4", group_size=4, activations="int8"),
        jc.quantize("uint4", group_size=4, symmetric=False, activations="int8", backward="int8"),
        jc.quantize("int2", symmetric=False),
        jc.quantize("nf4", group_size=4),
        jc.low_rank(rank=4),
    ],
    ids=["w8a8", "grouped w4a8", "backward", "words with zero points", "nf4", "low rank"],
)
def test_products_of_no_rows(c):
    """Such as those of an expert that no token chose; their derivatives are zero."""
    small, x = jc.compress({"w": W}, c), jnp.zeros((2, 0, 8))
    assert jax.jit(jc.lift(lambda p, x: x @ p["w"], on_fallback="error"))(small, x).shape == x.shape
    tx = jc.compressed_training(optax.sgd(1.0), c)
    state = tx.init({"w": W})
    loss = jc.lift(lambda p, x: jnp.sum(p["w"].T @ x.T), on_fallback="error")
    grads = jax.jit(jax.grad(loss))(c.view({"w": W}, state), x[0])
    assert jax.tree.reduce(lambda total, g: total + jnp.abs(g).sum(), grads, 0.0) == 0


@pytest.mark.parametrize("factor", [0.0, -1.0, -1e-3])
def test_steps_along_the_sum_times_a_factor(factor):
    small = jc.compress({"w": W}, jc.quantize("int8"))
    fn = lambda p, x: x @ (factor * p["w"]).T
    np.testing.assert_allclose(*both(fn, small, X), **CLOSE)
