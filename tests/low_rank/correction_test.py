"""Thin factors beside what is rounded, against numpy; and training of adapters alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc

MODEL = lambda params, x: x @ params["w"]


@pytest.fixture(scope="module")
def layer():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (256, 32)) * jnp.exp(jax.random.normal(keys[1], (32,)))
    params = {"w": jax.random.normal(keys[2], (32, 24))}
    uses, stats = jc.uses(MODEL, params, x), jc.calibrate(MODEL, params, [x])
    return params, x, {"uses": uses, "stats": stats}


def test_factors_are_those_of_the_error(layer):
    params, _, known = layer
    c = jc.low_rank_correction(jc.quantize("int3"), 4)
    small = jc.compress(params, c, **known)["w"]
    base = jc.compress(params, jc.quantize("int3"), **known)["w"]
    np.testing.assert_array_equal(small.parts[0].codes, base.codes)
    u, s, v = np.linalg.svd(np.asarray(params["w"] - base.materialize(), np.float64))
    want = (u[:, :4] * s[:4]) @ v[:4]
    np.testing.assert_allclose(small.parts[1].materialize(), want, atol=1e-5)


def test_whitened_factors_keep_outputs_and_rounds_keep_entries(layer):
    params, x, known = layer
    made = lambda **kw: jc.compress(
        params, jc.low_rank_correction(jc.quantize("int3"), 4, **kw), **known
    )
    outputs = lambda small: float(jnp.linalg.norm(jc.lift(MODEL)(small, x) - MODEL(params, x)))
    entries = lambda small: float(jnp.linalg.norm(small["w"].materialize() - params["w"]))
    plain, whitened, several = made(), made(whiten=True), made(rounds=5)
    assert outputs(whitened) < 0.9 * outputs(plain)
    assert entries(several) < entries(plain)


def test_activations_are_rounded_for_the_codes_alone(layer):
    params, x, known = layer
    c = jc.low_rank_correction(jc.quantize("int8", activations="int8"), 4)
    small = jc.compress(params, c, **known)
    base, thin = small["w"].parts
    want = jc.lift(MODEL)({"w": base}, x) + x @ thin.materialize()
    np.testing.assert_allclose(jc.lift(MODEL)(small, x), want, atol=1e-4)


def test_only_adapters_of_a_scanned_stack_train():
    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    params = {"w": jax.random.normal(jax.random.key(0), (3, 8, 8)), "b": jnp.ones(8)}
    x, y = jnp.ones((4, 8)), jnp.zeros((4, 8))
    c = jc.chain(jc.quantize("int4", where="w"), jc.lora(2, where="w"))
    small = jc.compress(params, c, uses=jc.uses(fn, params, x))
    adapters, frozen = jc.partition(small, "w/parts/1/*")
    assert jc.nbytes(adapters) == 4 * 3 * (8 * 2 + 2 * 8)
    loss = lambda adapters: jnp.mean((jc.lift(fn)(jc.combine(adapters, frozen), x) - y) ** 2)
    tx = optax.adam(0.05)

    @jax.jit
    def step(adapters, state):
        updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    state, start = tx.init(adapters), adapters
    for _ in range(5):
        adapters, state = step(adapters, state)
    assert loss(adapters) < 0.9 * loss(start)
    trained = jc.combine(adapters, frozen)
    np.testing.assert_array_equal(trained["w"].parts[0].codes, small["w"].parts[0].codes)
    moved = np.abs(trained["w"].parts[1].v - small["w"].parts[1].v).max((1, 2))
    assert (moved > 0).all()  # of each layer
