"""States of optimizers in few bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from jaxopt_compress.tree import named_leaves
from tests.precision.regression import KEY, regression


def trained(tx, steps=200, seed=0):
    params, loss = regression(seed)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return float(loss(params)), state


OPTIMIZERS = {
    "adam": optax.adam(3e-3),
    "adamw": optax.adamw(3e-3),
    "amsgrad": optax.amsgrad(3e-3),
    "lion": optax.lion(3e-4),
    "momentum": optax.sgd(0.05, momentum=0.9),
    "rmsprop": optax.rmsprop(1e-3),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=1024),
    "injected": optax.inject_hyperparams(optax.adam)(3e-3),
    "multi": optax.multi_transform(
        {"a": optax.adam(3e-3), "b": optax.sgd(0.05, momentum=0.9)},
        {"v": {"kernel": "a"}, "out": {"kernel": "b"}},
    ),
}


@pytest.mark.ci
@pytest.mark.fast("adam", "momentum")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_with_states_of_8_bits_is_training(name):
    """Within a few percent of the same optimizer in float32, of a quarter of the bytes."""
    whole, large = trained(OPTIMIZERS[name])
    loss, small = trained(jc.small_states(OPTIMIZERS[name]))
    start = float(regression()[1](regression()[0]))
    assert whole < 0.7 * start
    assert abs(loss - whole) < 0.1 * (start - whole)
    assert jc.nbytes(small) < 0.30 * jc.nbytes(large)


@pytest.mark.slow
@pytest.mark.ci
def test_states_of_4_bits_train_too():
    whole, large = trained(optax.adam(3e-3))
    loss, small = trained(jc.small_states(optax.adam(3e-3), "float4_e2m1fn"))
    start = float(regression()[1](regression()[0]))
    assert loss - whole < 0.2 * (start - whole)
    assert jc.nbytes(small) < 0.16 * jc.nbytes(large)


def test_averages_keep_their_expected_value():
    """An average that changes by less than a level per step still follows; nearest would not."""
    tx = jc.small_states(optax.ema(0.999, debias=False), min_size=1)
    params = jnp.zeros((64, 128))
    state, g = tx.init(params), jnp.ones((64, 128))

    @jax.jit
    def run(state):
        return jax.lax.fori_loop(0, 1000, lambda i, s: tx.update(g, s)[1], state)

    mean = float(jc.materialize(run(state).inner).ema.mean())
    assert abs(mean - (1 - 0.999**1000)) < 0.02


@pytest.mark.ci
def test_second_moments_are_never_rounded_to_zero_and_no_sign_is_lost():
    """In one block entries from 1e-12 to 1; a parameter that is called v keeps its signs."""
    tx = jc.small_states(optax.scale_by_adam(), min_size=1)
    params = {"v": {"kernel": jnp.zeros((1, 128))}}
    g = {"v": {"kernel": jnp.logspace(-6, 0, 128)[None] * jnp.where(jnp.arange(128) % 2, 1, -1)}}
    _, state = jax.jit(tx.update)(g, tx.init(params))
    inner = jc.materialize(state.inner)
    assert np.all(np.asarray(inner.nu["v"]["kernel"]) > 0)
    mu = np.asarray(inner.mu["v"]["kernel"])[0]
    large = np.abs(np.asarray(g["v"]["kernel"])[0]) > 0.05
    np.testing.assert_array_equal(
        np.sign(mu[large]), np.sign(np.asarray(g["v"]["kernel"])[0][large])
    )
    updates, _ = jax.jit(tx.update)(g, state)
    # No entry moves more than it does in float32, by more than rounding.
    assert float(jnp.abs(updates["v"]["kernel"]).max()) < 2


def test_scales_follow_each_block():
    """Rows of other sizes keep their relative precision."""
    tx = jc.small_states(optax.trace(0.9), min_size=1, block=32)
    rows = 10.0 ** jnp.arange(-8, 8)[:, None]
    g = rows * jax.random.normal(KEY, (16, 64))
    _, state = tx.update(g, tx.init(g))
    error = jnp.abs(jc.materialize(state.inner).trace - g) / jnp.abs(g).max(1, keepdims=True)
    assert float(error.max()) < 2.0**-3


def test_what_small_states_refuse():
    with pytest.raises(ValueError, match="'int8' for the second moment '0/nu/w'"):
        jc.small_states(optax.adam(1e-3), "int8").init({"w": jnp.ones((64, 64))})
    jc.small_states(optax.lion(1e-3), "int8").init({"w": jnp.ones((64, 64))})
    with pytest.raises(ValueError, match="no leaf of the state has 4096 entries"):
        jc.small_states(optax.adam(1e-3)).init({"w": jnp.ones((8, 8))})
    chosen = jc.small_states(optax.adam(1e-3), where=lambda path, leaf: "embed" not in path)
    params = {"embed": jnp.ones((64, 64)), "w": jnp.ones((64, 64))}
    inner = chosen.init(params).inner[0]
    assert isinstance(inner.nu["w"], jc.QuantizedArray)
    assert not isinstance(inner.nu["embed"], jc.QuantizedArray)


@pytest.mark.slow
def test_small_states_in_scans_under_vmap_and_around_compressed_training():
    params, loss = regression()
    c = jc.quantize("int8", where="**/kernel")
    tx = jc.small_states(jc.compressed_training(optax.adam(1e-3), c, layout="in,out"))
    state = tx.init(params)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(c.view(params, state))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss(params)

    (_, end), losses = jax.lax.scan(step, (params, state), length=20)
    assert losses[-1] < losses[0] and jax.tree.structure(end) == jax.tree.structure(state)
    both = jax.vmap(jc.small_states(optax.adam(1e-3)).init)(
        jax.tree.map(lambda x: jnp.stack([x, x]), params)
    )
    assert both.inner[0].nu["out"]["kernel"].shape[0] == 2


def test_moments_are_told_by_the_fields_of_states():
    """Not by labels; other copies of parameters, such as where training began, stay."""
    params = {"w": jnp.ones((64, 128))}
    labelled = optax.multi_transform({"m": optax.adam(1e-2)}, {"w": "m"})
    with pytest.raises(ValueError, match=r"for the second moment 'inner_states/m/.*nu/w'"):
        jc.small_states(labelled, "int8").init(params)
    few = lambda tx: {
        path.split("/")[-2]
        for path, x in named_leaves(jc.small_states(tx).init(params).inner)
        if isinstance(x, jc.QuantizedArray)
    }
    assert few(optax.contrib.prodigy()) == {"exp_avg", "exp_avg_sq"}
    assert few(optax.adam(1e-2)) == {"mu", "nu"}
    with pytest.raises(ValueError, match="centered RMSProp"):
        jc.small_states(optax.rmsprop(1e-2, centered=True)).init(params)
    assert few(optax.rmsprop(1e-2)) == {"nu"}


@pytest.mark.ci
def test_distances_estimated_from_moments_in_few_bits():
    """D-Adaptation multiplies its averages by an estimate; its sum of gradients is no moment."""
    want = jax.random.normal(KEY, (64, 128))
    small = jc.small_states(optax.contrib.dadapt_adamw())
    state = small.init({"w": jnp.zeros_like(want)})
    kept = {p for p, x in named_leaves(state.inner) if isinstance(x, jc.QuantizedArray)}
    assert kept == {"exp_avg/w", "exp_avg_sq/w"}

    def distances(tx, steps=60):
        def step(carry, _):
            params, state = carry
            grads = {"w": params["w"] - want}
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"w": jnp.zeros_like(want)}
        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        return jnp.linalg.norm(params["w"] - want), getattr(state, "inner", state).estim_lr

    (got, estimate), (plain, exact) = (
        distances(tx) for tx in (small, optax.contrib.dadapt_adamw())
    )
    # Rounded without bias: both near as fast, by about the same estimate of the distance.
    assert float(plain) < 0.5 * float(jnp.linalg.norm(want))
    assert float(got) < 1.1 * float(plain)
    np.testing.assert_allclose(estimate, exact, rtol=0.1)
