"""Sparsity that training learns: derivatives, penalties, noise, and what is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc

pytestmark = pytest.mark.filterwarnings(
    "ignore::jaxopt_compress.AssumedLayout", "ignore::jaxopt_compress.LargerWarning"
)
KEY = jax.random.key(0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def with_learned(state, name, value):
    return state._replace(learned={"w": {name: jnp.asarray(value, jnp.float32)}})


def test_soft_thresholds_against_the_formula():
    """Values, and the derivative with respect to what is learned by that of the plain formula."""
    w, c = normal(0, 8, 3), jc.soft_threshold(per="channel")
    s = jnp.array([[-1.0, 0.0, 0.5]])
    state = c.update(with_learned(c.init({"w": w}), "threshold", s), {"w": w})

    def plain(w, s):
        return jnp.sign(w) * jax.nn.relu(jnp.abs(w) - jax.nn.sigmoid(s))

    own = lambda w, s: c.apply({"w": w}, with_learned(state, "threshold", s))["w"]
    np.testing.assert_allclose(own(w, s), plain(w, s), rtol=1e-6, atol=1e-7)
    weights = normal(1, 8, 3)
    got, want = (jax.vjp(f, w, s)[1](weights) for f in (own, plain))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(c.penalty({"w": w}, state), 0.5 * 1.25, rtol=1e-6)


@pytest.mark.slow
def test_soft_thresholds_learn_sparsity():
    """The penalty lifts thresholds: a regression on two of eight inputs keeps those."""
    x = normal(2, 64, 8)
    y = x[:, :2] @ jnp.array([[2.0], [-3.0]])
    c = jc.soft_threshold(initial=-3.0)
    inner = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(3e-2))
    tx = jc.compressed_training(inner, c, penalty=0.1, learned=optax.sgd(3e-2))
    params = {"w": 0.3 * normal(3, 8, 1)}

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(lambda p: jnp.mean((x @ p["w"] - y) ** 2))(c.view(params, opt_state))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for _ in range(300):
        params, opt_state = step(params, opt_state)
    small = jc.compress(params, c, state=opt_state)["w"]
    np.testing.assert_array_equal(small.mask()[:, 0], [1, 1, 0, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(small.materialize()[:2, 0], [2, -3], atol=0.3)


@pytest.mark.fast("input")
@pytest.mark.parametrize("per", ["entry", "channel", "input"])
def test_hard_concrete_gates(per):
    """Gates are 0 as often as the penalty says; what is stored has no noise."""
    w, shape = jnp.ones((40, 50)), {"entry": (40, 50), "channel": (1, 50), "input": (40, 1)}[per]
    log_alpha = jnp.linspace(-3, 3, int(np.prod(shape))).reshape(shape)
    c = jc.hard_concrete(KEY, per=per)
    state = with_learned(c.init({"w": w}), "log_alpha", log_alpha)

    @jax.jit
    def open_share(state):
        def step(state, _):
            state = c.update(state, {"w": w})
            return state, jnp.mean(c.loss_view({"w": w}, state)["w"] > 0)

        return jax.lax.scan(step, state, None, length=100)[1]

    shares = open_share(state)
    expected = float(c.penalty({"w": w}, state)) / 2000
    # The mean of 100 draws of at least 40 gates each.
    np.testing.assert_allclose(jnp.mean(shares), expected, atol=4 * 0.5 / np.sqrt(4000))
    assert len(set(np.asarray(shares).tolist())) > 1
    state = c.update(state, {"w": w})
    gate = np.clip(1.2 / (1 + np.exp(-np.asarray(log_alpha))) - 0.1, 0, 1)
    view = c.apply({"w": w}, state)["w"]
    np.testing.assert_allclose(view, np.broadcast_to(gate, w.shape), atol=1e-6)
    small = c.compress({"w": w}, state)["w"]
    np.testing.assert_array_equal(small.mask(), np.broadcast_to(gate > 0, w.shape))
    with pytest.raises(ValueError, match="per='layer'"):
        jc.hard_concrete(KEY, per="layer")


def test_variational_dropout():
    """Noise of the learned size, pruned where it outweighs; a penalty that falls with noise."""
    w = jnp.concatenate([jnp.ones((300, 2)), jnp.full((300, 2), 1e-3)], 1)
    c = jc.variational_dropout(KEY, initial=2 * np.log(0.1))
    state = c.init({"w": w})
    np.testing.assert_array_equal(state.leaves["w"].mask, np.asarray(w) == 1)
    noise = c.view({"w": w}, state)["w"] - w
    np.testing.assert_allclose(jnp.std(noise), 0.1, rtol=0.1)
    moved = c.update(state, {"w": w})
    assert bool(jnp.any(c.view({"w": w}, moved)["w"] - w != noise))
    penalties = [
        float(c.penalty({"w": w}, with_learned(state, "log_variance", jnp.full(w.shape, v))))
        for v in (-8, -4, 0, 4)
    ]
    assert penalties == sorted(penalties, reverse=True)
    # Large noise costs nothing in the end: the prior is that of noise alone.
    far = with_learned(state, "log_variance", jnp.full(w.shape, 40.0))
    np.testing.assert_allclose(c.penalty({"w": w}, far), 0, atol=1e-2)


def l1_by_hand(w, by):
    return np.sign(w) * np.maximum(np.abs(w) - by, 0)


def test_proximal_steps():
    """Against the formulas, and stationary points: a step at the minimum does not move."""
    w = normal(0, 6, 4)
    params, nothing = {"w": w, "bias": jnp.ones(4)}, {"w": jnp.zeros((6, 4)), "bias": jnp.zeros(4)}

    def moved(tx):
        updates, _ = jax.jit(tx.update)(nothing, tx.init(params), params)
        new = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(new["bias"], params["bias"])
        return np.asarray(new["w"])

    np.testing.assert_allclose(moved(jc.proximal.l1(0.5)), l1_by_hand(w, 0.5), atol=1e-6)
    assert (moved(jc.proximal.l1(lambda step: 0.5 + step)) == 0).any()
    for groups, axis, size in (("channels", 0, 6), ("inputs", 1, 4)):
        norms = np.linalg.norm(w, axis=axis, keepdims=True)
        by = np.median(norms) / np.sqrt(size)
        want = w * np.maximum(1 - by * np.sqrt(size) / norms, 0)
        got = moved(jc.proximal.group_lasso(float(by), groups))
        np.testing.assert_allclose(got, want, atol=1e-6)
        assert ((got == 0).all(axis)).sum() >= 1
    u, values, v = np.linalg.svd(w, full_matrices=False)
    want = (u * np.maximum(values - values[2], 0)) @ v
    got = moved(jc.proximal.nuclear(float(values[2])))
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.linalg.matrix_rank(got, tol=1e-4) == 2
    with pytest.raises(ValueError, match="groups='rows'"):
        jc.proximal.group_lasso(0.1, "rows")
    with pytest.raises(ValueError, match="need the params"):
        jc.proximal.l1(0.1).update(nothing, jc.proximal.l1(0.1).init(params))


@pytest.mark.slow
def test_proximal_steps_of_stacks_are_apart():
    w = normal(0, 3, 6, 4) * jnp.array([1.0, 100.0, 0.01])[:, None, None]
    for tx in (jc.proximal.group_lasso(0.3), jc.proximal.nuclear(1.0)):
        own = lambda w, tx=tx: tx.update({"w": jnp.zeros_like(w)}, tx.init({"w": w}), {"w": w})[0]
        got = own(w)["w"]
        want = jnp.stack([own(w[i])["w"] for i in range(3)])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
