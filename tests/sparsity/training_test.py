"""Pruning in training: gradients that pass, dense phases, and scores that accumulate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc

pytestmark = pytest.mark.filterwarnings("ignore::jaxopt_compress.AssumedLayout")


def test_gradients_pass_straight_through():
    c = jc.prune(
        jc.scores.magnitude(), jc.schedules.constant(0.5, every=1), backward="straight_through"
    )
    tx = jc.compressed_training(optax.sgd(1.0), jc.chain(c, jc.quantize("int8")))
    params = {"w": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    opt_state = tx.init(params)
    updates, opt_state = tx.update({"w": jnp.array([[1.0], [2], [3], [-4]])}, opt_state, params)
    np.testing.assert_array_equal(updates["w"][:, 0], [-1, -2, -3, 4])
    params = optax.apply_updates(params, updates)
    _, opt_state = tx.update({"w": jnp.zeros((4, 1))}, opt_state, params)
    np.testing.assert_array_equal(
        jc.chain(c, jc.quantize("int8")).view(params, opt_state)["w"][:, 0] != 0, [1, 0, 0, 1]
    )


def test_dense_phases_begin_with_zeros():
    schedule = jc.schedules.cyclic(0.5, dense=2, sparse=2, end=4)
    c = jc.prune(jc.scores.magnitude(), schedule, pruned="zero")
    tx = jc.compressed_training(optax.sgd(0.0), c)
    params = {"w": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    opt_state, counts = tx.init(params), []
    for _ in range(5):
        updates, opt_state = tx.update({"w": jnp.ones((4, 1))}, opt_state, params)
        params = optax.apply_updates(params, updates)
        counts.append(int(jnp.sum(opt_state.compression.leaves["w"].mask)))
        np.testing.assert_array_equal(params["w"][:, 0], [4, 3, 0, 0])
    assert counts == [2, 4, 4, 2, 2]


@pytest.mark.fast("movement")
@pytest.mark.parametrize("name", ["saliency", "movement", "fisher"])
def test_scores_that_accumulate(name):
    """Against sums by hand over three updates, of which the last one prunes."""
    score = {
        "saliency": jc.scores.saliency(0.5),
        "movement": jc.scores.movement(),
        "fisher": jc.scores.fisher(0.5),
    }[name]
    rng = np.random.default_rng(3)
    w, grads = rng.standard_normal((6, 4)), rng.standard_normal((3, 6, 4))
    params = {"w": jnp.asarray(w, jnp.float32)}
    c = jc.prune(score, jc.schedules.one_shot(0.5, 3))
    state, update = c.init(params), jax.jit(c.update)
    for g in grads:
        state = update(state, params, grads={"w": jnp.asarray(g, jnp.float32)})
    decays = np.array([0.25, 0.5, 1.0])[:, None, None]
    want = {
        "saliency": np.sum(decays * np.abs(w * grads), 0),
        "movement": -np.sum(w * grads, 0),
        "fisher": w**2 * np.sum(decays * grads**2, 0),
    }[name]
    np.testing.assert_array_equal(state.leaves["w"].mask, want >= np.sort(want.ravel())[12])
    with pytest.raises(ValueError, match=r"prunes 0.5 at step 0.*accumulates gradients.*one_shot"):
        jc.prune(score, jc.schedules.constant(0.5)).init(params)
