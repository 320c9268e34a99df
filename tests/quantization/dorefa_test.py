"""DoReFa's weights: known answers, the contract, and training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.compression import as_compression
from tests.quantization import cases
from tests.quantization.cases import assert_same_bits
from tests.quantization.learned import COTANGENT, X, answer, mlp, mlp_params, steady

# All of the known answers share one maximum.
ONE = {"w": X}


def test_known_answers():
    want = answer("dorefa_weight_4bit_detached")
    c = jc.dorefa("odd4")
    state = c.init(ONE)
    view, pull = jax.vjp(lambda params: c.apply(params, state), ONE)
    np.testing.assert_allclose(view["w"], want["y"], rtol=1e-6)
    grad = pull({"w": COTANGENT})[0]["w"]
    np.testing.assert_allclose(grad, want["grad_x"], rtol=1e-4, atol=1e-7)
    move = {"w": jnp.ones_like(X)}
    pushed = jax.jvp(lambda params: c.apply(params, state), (ONE,), (move,))[1]["w"]
    np.testing.assert_array_equal(pushed, pull(move)[0]["w"])


def test_one_bit_is_the_sign_times_the_mean():
    want = answer("dorefa_weight_1bit")
    c = jc.dorefa("binary")
    state = c.init(ONE)
    view, pull = jax.vjp(lambda params: c.apply(params, state), ONE)
    there = np.asarray(X) != 0  # Zeros go down here, and up there.
    np.testing.assert_allclose(np.asarray(view["w"])[there], want["y"][there], rtol=1e-6)
    np.testing.assert_array_equal(pull({"w": COTANGENT})[0]["w"], want["grad_x"])


@pytest.mark.parametrize("extreme", [False, True])
def test_stored_form_is_the_view(extreme):
    options = {f: {} for f in ("binary", "odd2", "odd3", "odd4")}
    names = [(f"{f}-{per}", f, per) for f in options for per in ("tensor", "channel")]
    c = as_compression({name: jc.dorefa(f, per=per) for name, f, per in names})
    params = {}
    for i, (name, *_) in enumerate(names):
        dtype = cases.DTYPES[i % 3]
        make = cases.extreme(i, cases.SHAPE, dtype) if extreme else cases.ordinary(i, cases.SHAPE)
        params[name] = jnp.asarray(make.astype(dtype))
    state = jax.jit(c.init)(params)
    # In training, steps are those of the parameters before.
    later = jax.tree.map(lambda w: jnp.clip(w, -9, 9) * 1.25, params)
    for now in (params, later):
        view, small = jax.jit(c.apply)(now, state), jax.jit(c.compress)(now, state)
        assert_same_bits(jax.jit(jc.materialize)(small), view)
        for leaf in view.values():
            assert np.isfinite(np.asarray(leaf, np.float32)).all()
    codes = small["odd3-tensor"]
    assert isinstance(codes, jc.QuantizedArray)
    assert codes.nbytes == 3 * codes.size // 8 + 4


def test_levels_are_the_formula():
    """In float64, except within rounding of where a level changes."""
    w = np.asarray(steady(0, 64, 8)) * 1.5
    for name, steps in (("odd2", 3), ("odd3", 7)):
        r = np.tanh(w.astype(float)) / (2 * np.abs(np.tanh(w.astype(float))).max()) + 0.5
        want = 2 * np.round(r * steps) / steps - 1
        near = np.abs((r * steps) % 1 - 0.5) < 1e-5
        c = jc.dorefa(name)
        got = jax.jit(lambda w, c=c: c.apply({"w": w}, c.init({"w": w})))(jnp.asarray(w))["w"]
        np.testing.assert_allclose(np.asarray(got)[~near], want[~near], rtol=1e-6)


def test_stacks_have_maxima_of_their_own():
    w = steady(1, 3, 8, 8) * jnp.array([1.0, 10, 0.1])[:, None, None]

    def deep(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    uses = jc.uses(deep, {"w": w}, steady(2, 4, 8))
    c = jc.dorefa("odd2")
    view = c.apply({"w": w}, c.init({"w": w}, uses=uses))["w"]
    single = jax.jit(lambda w: c.apply({"w": w}, c.init({"w": w}))["w"])
    alone = [single(each) for each in w]
    np.testing.assert_array_equal(view, jnp.stack(alone))


@pytest.mark.slow
def test_integer_products():
    """Codes without a zero meet codes of activations as the odd integers that they stand for."""
    params, x = mlp_params(), jax.nn.sigmoid(steady(9, 64, 8))
    c = as_compression(
        {
            "a/*": jc.dorefa("binary", activations="uint4"),
            "b/*": jc.dorefa("odd3", activations="uint4"),
        }
    )
    small, run = jc.compress(params, c), jc.lift(mlp)
    step = jnp.float32(1 / 15)
    rounded = lambda x: jnp.clip(jnp.round(x / step), 0, 15) * step
    dense = jc.materialize(small)
    want = rounded(jax.nn.relu(rounded(x) @ dense["a"]["w"])) @ dense["b"]["w"]
    np.testing.assert_allclose(jax.jit(run)(small, x), want, rtol=1e-4, atol=1e-5)
    text = str(jax.make_jaxpr(run)(small, x))
    assert text.count("preferred_element_type=int32") >= 2
    assert "preferred_element_type=float32" not in text


def test_pruned_parameters_are_refused():
    c = jc.chain(
        jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), "2:4"), jc.dorefa("odd2")
    )
    params = {"w": steady(0, 8, 4)}
    with pytest.raises(ValueError, match="no code for 0"):
        c.init(params)
