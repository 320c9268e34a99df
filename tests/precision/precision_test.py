"""Mixed precision, loss scaling and stochastic rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from tests.precision.regression import KEY, regression


def test_mixed_precision_computes_in_the_type_and_differentiates_in_that_of_parameters():
    params, loss = regression()
    seen = []

    def spying(params, x):
        seen.append((params["v"]["kernel"].dtype, x.dtype))
        return loss(params), x

    fast = jc.mixed_precision(spying, jnp.bfloat16)
    value, x = fast(params, jnp.ones(3))
    assert seen == [(jnp.bfloat16, jnp.bfloat16)] and value.dtype == x.dtype == jnp.float32
    grads = jax.grad(lambda p: fast(p, jnp.ones(3))[0])(params)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    kept = jc.mixed_precision(spying, jnp.float16, None, keep="v/*")
    assert kept(params, jnp.ones(3, jnp.int32))[1].dtype == jnp.int32
    assert seen[-1][0] == jnp.float32
    with pytest.raises(ValueError, match="keep"):
        jc.mixed_precision(spying, keep="nothing")(params, jnp.ones(3))
    with pytest.raises(TypeError, match="floating"):
        jc.mixed_precision(spying, "int8")


def test_compressed_parameters_pass_through_mixed_precision():
    params = {"w": jax.random.normal(KEY, (64, 32))}
    small = jc.compress(params, jc.quantize("int8"), layout="in,out")
    fn = lambda p, x: x @ p["w"]
    x = jax.random.normal(KEY, (4, 64))
    got = jc.mixed_precision(jc.lift(fn), jnp.bfloat16)(small, x)
    want = fn(jc.materialize(small), x)
    np.testing.assert_allclose(got, want, atol=0.02 * float(jnp.abs(want).max()))


def test_loss_scale_grows_shrinks_and_leaves_out_steps():
    tx = jc.dynamic_loss_scale(optax.adam(0.1), initial=8.0, period=3)
    params = {"w": jnp.ones(4), "n": None}
    state, start = tx.init(params), params
    update = jax.jit(tx.update)
    bad = {"w": jnp.array([1.0, jnp.inf, 0, 0]), "n": None}
    updates, state = update(bad, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["w"], start["w"])
    assert (float(jc.loss_scale(state)), int(state.skipped)) == (4.0, 1)
    assert int(state.inner[0].count) == 0
    scales = []
    for _ in range(6):
        updates, state = update({"w": 4.0 * jnp.ones(4), "n": None}, state, params)
        scales.append(float(jc.loss_scale(state)))
    assert scales == [4.0, 4.0, 8.0, 8.0, 8.0, 16.0]
    plain = optax.adam(0.1)
    want, _ = plain.update({"w": jnp.ones(4), "n": None}, plain.init(params), params)
    first, _ = tx.update({"w": 8.0 * jnp.ones(4), "n": None}, tx.init(params), params)
    np.testing.assert_allclose(first["w"], want["w"])
    with pytest.raises(ValueError, match="0 states"):
        jc.loss_scale(plain.init(params))


def test_a_loss_scale_without_floats_takes_every_step():
    tx, params = jc.dynamic_loss_scale(optax.identity(), period=1), {"n": jnp.arange(2)}
    updates, state = tx.update(params, tx.init(params))
    np.testing.assert_array_equal(updates["n"], params["n"])
    assert int(state.skipped) == 0


def test_an_optimizer_inside_stochastic_rounding_computes_in_float32():
    """Its state and updates are those for float32 parameters and gradients of the same values."""
    params, grads = ({"w": jnp.linspace(a, 1, 64).astype(jnp.bfloat16)} for a in (0.5, -1))
    adam = optax.adamw(1e-2)
    tx = jc.stochastic_rounding(adam)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    want, plain = adam.update(wide(grads), adam.init(wide(params)), wide(params))
    updates, state = tx.update(grads, tx.init(params), params)
    for got, each in zip(jax.tree.leaves(state.inner), jax.tree.leaves(plain), strict=True):
        assert got.dtype == each.dtype
        np.testing.assert_array_equal(got, each)
    # Rounded up or down: within a step of bfloat16 below 2.
    np.testing.assert_allclose(updates["w"], want["w"], atol=2.0**-7)
    assert optax.apply_updates(params, updates)["w"].dtype == jnp.bfloat16


def test_stochastic_rounding_moves_bfloat16_parameters_as_float32_ones():
    """500 steps of a hundredth of a level; rounded to the nearest, none of them would be one."""
    params = jnp.full((2000,), 1.0, jnp.bfloat16)
    tx = optax.chain(optax.identity(), jc.stochastic_rounding())
    step = jnp.full((2000,), 2.0**-7 / 100, jnp.float32)

    @jax.jit
    def run(params, state):
        def one(_, carry):
            updates, state = tx.update(step, carry[1], carry[0])
            return optax.apply_updates(carry[0], updates), state

        return jax.lax.fori_loop(0, 500, one, (params, state))

    moved = np.asarray(run(params, tx.init(params))[0].astype(jnp.float32))
    # A random walk of 500 steps of variance p (1 - p), over 2000 parameters.
    error = 2.0**-7 * (500 * 0.01 / 2000) ** 0.5
    assert abs(moved.mean() - (1 + 5 * 2.0**-7)) < 5 * error
    assert params.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="needs params"):
        tx.update(step, tx.init(params))
    bad, _ = tx.update(jnp.full((2000,), jnp.nan), tx.init(params), params)
    assert bool(jnp.all(jnp.isnan(bad)))
