"""When steps change: after each update, as an average, from a step on, or up to one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from tests.quantization.cases import assert_same_bits, normal, view


def absmax(w, axes):
    return np.abs(np.asarray(w, np.float32)).max(axes, keepdims=True)


def follow(c, weights):
    """The state after each update, the updates compiled once."""
    state = c.init({"w": weights[0]})
    update = jax.jit(c.update)
    states = [state]
    for w in weights[1:]:
        state = update(state, {"w": w})
        states.append(state)
    return states


WEIGHTS = [normal(64, 8, seed=s) * (s + 1) for s in range(5)]


def test_steps_follow_the_parameters():
    c = jc.quantize("int8")
    for state, w in zip(follow(c, WEIGHTS), WEIGHTS, strict=True):
        np.testing.assert_array_equal(state.leaves["w"].scale, absmax(w, 0) / np.float32(127.5))


@pytest.mark.parametrize("symmetric", [True, False])
def test_moving_average(symmetric):
    c = jc.quantize("int8", symmetric=symmetric, bounds=jc.bounds.moving_average(0.75))
    low = high = None
    for state, w in zip(follow(c, WEIGHTS), WEIGHTS, strict=True):
        w = np.asarray(w, np.float64)
        new = w.min(0), w.max(0)
        if symmetric:
            new = -np.abs(w).max(0), np.abs(w).max(0)
        old = new if low is None else (low, high)
        low, high = (0.75 * a + 0.25 * b for a, b in zip(old, new, strict=True))
        steps = high / 127.5 if symmetric else (np.maximum(high, 0) - np.minimum(low, 0)) / 255
        np.testing.assert_allclose(state.leaves["w"].scale[0], steps, rtol=1e-6)
        if not symmetric:
            zero = np.round(-128 - np.minimum(low, 0) / steps)
            assert (np.abs(state.leaves["w"].zero[0] - zero) <= 1).all()


def test_moving_average_of_percentiles():
    percentile = jc.bounds.percentile(90)
    c = jc.quantize("int8", bounds=jc.bounds.moving_average(0.5, percentile))
    alone = [jc.quantize("int8", bounds=percentile).init({"w": w}) for w in WEIGHTS[:2]]
    a, b = (s.leaves["w"].scale for s in alone)
    got = follow(c, WEIGHTS[:2])[1].leaves["w"].scale
    np.testing.assert_allclose(got, (a + b) / 2, rtol=1e-6)


@pytest.mark.parametrize("name", ["int4", "mxfp4"])
def test_begin(name):
    w = normal(64, 8).at[0, 0].set(-0.0)
    params = {"w": w}
    c = jc.quantize(name, begin=2)
    update = jax.jit(c.update)
    state = c.init(params)
    slope = lambda state: jax.grad(lambda p: jnp.sum(c.apply(p, state)["w"] ** 2))(params)["w"]
    for _ in range(2):
        # Bit for bit as they are, the sign of zero included, and so are the gradients.
        assert_same_bits(c.apply(params, state), params)
        assert_same_bits(c.compress(params, state), params)
        np.testing.assert_array_equal(slope(state), 2 * w)
        state = update(state, params)
    want = view(jc.quantize(name), w)
    assert_same_bits(c.apply(params, state)["w"], want)
    small = c.compress(params, state)["w"]
    assert isinstance(small, jc.QuantizedArray)
    assert_same_bits(small.materialize(), want)


def test_freeze():
    """Steps of the update named last; parameters are still quantized, on the old grid."""
    c = jc.quantize("int8", freeze=2)
    states = follow(c, WEIGHTS)
    scales = [np.asarray(s.leaves["w"].scale) for s in states]
    for i in range(3):
        np.testing.assert_array_equal(scales[i], absmax(WEIGHTS[i], 0) / np.float32(127.5))
    for later in scales[3:]:
        np.testing.assert_array_equal(later, scales[2])
    params = {"w": WEIGHTS[4]}
    seen = c.apply(params, states[4])["w"]
    assert (jnp.max(jnp.abs(seen), 0) <= 128 * scales[2][0]).all()
    assert_same_bits(jc.materialize(c.compress(params, states[4]))["w"], seen)


@pytest.mark.parametrize(
    "given",
    [
        {"bounds": jc.bounds.moving_average(0.5), "freeze": 2},
        {"key": jax.random.key(0), "freeze": 1, "begin": 1},
        {"group_size": 16, "scale_dtype": "float8_e4m3fn", "freeze": 1},
        {"symmetric": False, "scale_dtype": "bfloat16", "begin": 2},
    ],
    ids=["average", "stochastic", "double", "asymmetric"],
)
def test_updates_in_a_scan(given):
    """States keep their types, and a scan gives what single updates do."""
    c = jc.quantize("int4", **given)
    states = follow(c, WEIGHTS)

    def step(state, w):
        state = c.update(state, {"w": w})
        return state, c.apply({"w": w}, state)["w"]

    last, views = jax.jit(lambda s, w: jax.lax.scan(step, s, w))(states[0], jnp.stack(WEIGHTS[1:]))
    assert jax.tree.structure(last) == jax.tree.structure(states[-1])
    for i, state in enumerate(states[1:]):
        want = c.apply({"w": WEIGHTS[i + 1]}, state)["w"]
        if "key" in given:
            assert_same_bits(views[i], want)
        else:
            # Averages may be fused otherwise, and differ in the last place.
            np.testing.assert_allclose(views[i], want, rtol=1e-5, atol=1e-5)
