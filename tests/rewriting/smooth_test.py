"""Smoothed functions against themselves, and scales against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from tests.rewriting.fold_scales_test import MLP, D, X, mlp, normal, stacked

pytestmark = pytest.mark.ci
OUT = jnp.where(jnp.arange(D) < 2, 40.0, 1.0)  # the norm makes two channels outliers


def test_all_weights_that_read_a_norm_share_the_scales_of_the_formula():
    params = {**MLP, "scale": MLP["scale"] * OUT}
    stats = jc.calibrate(mlp, params, [X])
    rw = jc.smooth(mlp, params, X, stats=stats, exact=False)
    reach = np.asarray(stats["up"][0].absmax)
    weight = np.maximum(*(np.abs(np.asarray(MLP[k])).max(1) for k in ("gate", "up")))
    s = np.sqrt(reach / weight)
    np.testing.assert_allclose(rw.params["scale"], params["scale"] / s, rtol=1e-5)
    np.testing.assert_allclose(rw.params["bias"], params["bias"] / s, rtol=1e-5)
    np.testing.assert_allclose(rw.params["gate"], params["gate"] * s[:, None], rtol=1e-5)
    assert rw.check(mlp, X).relative < 1e-5
    assert sorted(rw.factors) == ["bias", "down", "gate", "scale", "up"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), rw.undo(rw.params), params
    )


@pytest.mark.slow
def test_layers_of_a_stack_keep_every_bit_and_round_better():
    params = {k: jnp.stack([v, 3 * v]) for k, v in MLP.items()}
    params["scale"] = params["scale"] * jnp.stack([OUT, OUT[::-1]])
    rw = jc.smooth(stacked, params, X, stats=jc.calibrate(stacked, params, [X]))
    assert rw.check(stacked, X).absolute == 0
    factors = np.asarray(rw.factors["scale"])
    assert factors.shape == (2, D) and not np.array_equal(*factors)
    c = jc.quantize("int8", where=["gate", "up", "down"], activations="int8")

    def error(params):
        small = jc.compress(params, c, uses=jc.uses(stacked, params, X))
        return float(jnp.abs(jc.lift(stacked)(small, X) - stacked(params, X)).mean())

    assert error(rw.params) < 0.7 * error(params)


def test_what_keeps_its_range_says_why():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    params = {"a": normal(0, D, 8), "b": normal(1, 8, 4)}
    with pytest.raises(ValueError, match=r"no channels to scale.*tanh is not positively"):
        jc.smooth(fn, params, X, stats=jc.calibrate(fn, params, [X]))
    with pytest.raises(ValueError, match="alpha=2"):
        jc.smooth(fn, params, X, stats={}, alpha=2)
    rw = jc.smooth(mlp, MLP, X, stats=jc.calibrate(mlp, MLP, [X], where=["up", "down"]))
    assert "no statistics of what meets 'gate'" in rw.skipped["up"]


def test_a_rectified_product_of_two_output_axes_is_named():
    fn = lambda p, x: jnp.einsum(
        "bhk,hko->bo", jax.nn.relu(jnp.einsum("bd,dhk->bhk", x, p["a"])), p["b"]
    )
    params = {"a": normal(0, D, 2, 4), "b": normal(1, 2, 4, 3)}
    with pytest.raises(ValueError, match=r"'b': .*'a', which makes .* not one axis of output"):
        jc.smooth(fn, params, X, stats=jc.calibrate(fn, params, [X]))
