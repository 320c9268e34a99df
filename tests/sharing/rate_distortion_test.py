"""Training for bits: the penalty by hand, and files that become smaller."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc

pytestmark = pytest.mark.filterwarnings(
    "ignore::jaxopt_compress.AssumedLayout", "ignore::jaxopt_compress.LargerWarning"
)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.ci
def test_the_penalty_is_its_formula_for_each_entry_of_a_stack():
    """Spelled out entry by entry, with rows and columns of zeros."""
    w = normal(0, 2, 6, 4) * jnp.array([1.0, 0.3])[:, None, None]
    w = w.at[:, 2].set(0.1).at[0, :, 1].set(0.0)
    c = jc.rate_distortion(step=0.5, stack=1)
    total = sum(bits_of(np.abs(np.asarray(part, np.float64)) / 0.5) for part in w)
    params = {"w": w}
    np.testing.assert_allclose(c.penalty(params, c.init(params)), total, rtol=1e-5)


def bits_of(u):
    """The estimate of a matrix of magnitudes over steps."""
    there = u > 0.5
    odds = lambda p: np.log2(np.clip(p, 1e-4, 0.98) / (1 - np.clip(p, 1e-4, 0.98)))
    high, wide = there.any(1).sum(), there.any(0).sum()
    share = (there.sum() + 0.5) / (high * wide + 1)
    total = 0.0
    for i, j in np.ndindex(u.shape):
        own = there[i, j]
        row = (there[i].sum() - own + 4 * share) / (wide - own + 4)
        column = (there[:, j].sum() - own + 4 * share) / (high - own + 4)
        z = odds(share) + 0.8 * (odds(row) - odds(share)) + 0.8 * (odds(column) - odds(share))
        z = np.clip(-z, 0, 12) + 1.5
        base = np.log2(1 + 2.0 ** (1.5 - z))
        total += z * (1 - np.exp(-u[i, j] / 0.7)) + 1.2 * np.log2(1 + u[i, j]) + base
    return total


def test_steps_have_the_derivative_of_their_logarithm():
    w, c = normal(1, 8, 4), jc.rate_distortion(step=0.25)
    state = c.init({"w": w})
    view = lambda log: jnp.sum(
        c.apply({"w": w}, state._replace(learned={"w": {"log2_step": log}}))["w"]
    )
    got = jax.grad(view)(state.learned["w"]["log2_step"])
    ratio = np.asarray(w) / 0.25
    np.testing.assert_allclose(got, np.sum((np.round(ratio) - ratio) * 0.25 * np.log(2)), rtol=1e-4)


@pytest.mark.ci
def test_bits_go_where_the_loss_needs_them():
    """A regression on two of sixteen inputs: the codes of the others become 0, and bytes fewer."""
    x = normal(2, 128, 16)
    y = x[:, :2] @ normal(3, 2, 8)
    c = jc.rate_distortion(step=2.0**-5)
    tx = jc.compressed_training(optax.adam(2e-2), c, penalty=1e-4)
    params = {"w": normal(4, 16, 8) / 4}

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(lambda v: jnp.mean((x @ v["w"] - y) ** 2))(c.view(params, opt_state))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    before = jc.nbytes(jc.compress(params, c, state=opt_state))
    for _ in range(300):
        params, opt_state = step(params, opt_state)
    small = jc.compress(params, c, state=opt_state)
    view = c.view(params, opt_state)["w"]
    np.testing.assert_array_equal(small["w"].materialize(), view)
    assert not view[2:].any() and view[:2].any()
    assert jc.nbytes(small) < before / 2
    assert float(jnp.mean((x @ view - y) ** 2)) < 0.02


def test_refusals():
    with pytest.raises(ValueError, match="needs signed integers, not 'nf4'"):
        jc.rate_distortion("nf4")
    with pytest.raises(ValueError, match="step=0"):
        jc.rate_distortion(step=0)
    with pytest.raises(TypeError, match=r"compressed_training\(..., penalty=\)"):
        jc.rate_distortion(rate=1e-6)  # pyright: ignore
