"""Factors that keep outputs: the least weighted error, in closed form by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.numerics.whitening import outputs_of, weighted_rows

RNG = np.random.default_rng(0)
K, N, RANK = 12, 9, 3


def inputs(*lead):
    """Correlated inputs, of other sizes in each direction and each entry of a stack."""
    x = RNG.standard_normal((*lead, 64, K)) @ RNG.standard_normal((K, K))
    x = x * np.exp(RNG.uniform(-2, 2, (*lead, 1, K)))
    return jnp.asarray(x, jnp.float32)


def weights(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def best_error(x, w, rank):
    """``min ||X (W - V)||`` over matrices of a rank: the singular values of ``X W`` left out."""
    s = np.linalg.svd(np.asarray(x, np.float64) @ np.asarray(w, np.float64), compute_uv=False)
    return np.sqrt(np.sum(s[rank:] ** 2))


def error(x, w, small):
    d = np.asarray(w, np.float64) - np.asarray(small, np.float64)
    return np.linalg.norm(np.asarray(x, np.float64) @ d)


# A small share of damping moves the optimum of an error by its square.
CLOSE = {"rtol": 1e-3}


@pytest.mark.parametrize("layout", ["in,out", "out,in"])
def test_no_factors_of_that_rank_lose_less_of_the_outputs(layout):
    x, w = inputs(), weights(K, N)
    turned = layout == "out,in"
    fn = lambda p, x: x @ (p["w"].T if turned else p["w"])
    params = {"w": w.T if turned else w}
    stats = jc.calibrate(fn, params, [x])
    uses = jc.uses(fn, params, x)

    def run(**given):
        small = jc.compress(params, jc.low_rank(RANK, **given), uses=uses, stats=stats)
        dense = jc.materialize(small)["w"]
        return error(x, w, dense.T if turned else dense)

    best = best_error(x, w, RANK)
    np.testing.assert_allclose(run(whiten=True), best, **CLOSE)
    assert run() > 1.2 * best
    assert best < run(whiten="scale") < run()


def test_each_entry_of_a_stack_has_its_own_moment():
    x, w = inputs(3), weights(3, K, N)
    fn = lambda p, x: jnp.einsum("ebk,ekn->ebn", x, p["w"])
    stats, uses = jc.calibrate(fn, {"w": w}, [x]), jc.uses(fn, {"w": w}, x)
    small = jc.compress({"w": w}, jc.low_rank(RANK, whiten=True), uses=uses, stats=stats)
    for a, b, c in zip(x, w, jc.materialize(small)["w"], strict=True):
        np.testing.assert_allclose(error(a, b, c), best_error(a, b, RANK), **CLOSE)


@pytest.mark.ci
def test_layer_after_layer():
    x, params = inputs(), {"a": weights(K, K), "b": weights(K, N)}
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    c = jc.low_rank(RANK, whiten=True)
    small = jc.materialize(jc.compress_in_order(fn, params, c, [x], progress=False))
    met = jnp.tanh(x @ small["a"])
    np.testing.assert_allclose(
        error(met, params["b"], small["b"]), best_error(met, params["b"], RANK), **CLOSE
    )


@pytest.mark.ci
def test_gradients_weigh_inputs():
    w, x = weights(K, N), inputs()
    loss = lambda p, x: jnp.sum(jnp.sin(x @ p["w"]) ** 2)
    stats = jc.calibrate(loss, {"w": w}, [x[:8], x[8:]], measures=(jc.measures.fisher(),))
    c = jc.low_rank(RANK, whiten="fisher")
    small = jc.compress({"w": w}, c, uses=jc.uses(loss, {"w": w}, x), stats=stats)
    squares = [np.asarray(jax.grad(loss)({"w": w}, y)["w"]) ** 2 for y in (x[:8], x[8:])]
    rows = np.sqrt(np.sum(np.mean(squares, 0), -1))
    got = error(np.diag(rows), w, jc.materialize(small)["w"])
    np.testing.assert_allclose(got, best_error(np.diag(rows), w, RANK), **CLOSE)


@pytest.mark.parametrize("kind", ["zero", "one direction", "huge", "tiny"])
def test_moments_without_a_root_give_no_nan(kind):
    x = np.asarray(inputs(), np.float64) * {"huge": 1e15, "tiny": 1e-15}.get(kind, 1)
    x = np.zeros_like(x) if kind == "zero" else x[:1] if kind == "one direction" else x
    w = weights(K, N)
    met = outputs_of(w, jnp.asarray(x.T @ x / len(x), jnp.float32))
    assert np.isfinite(met).all()
    if kind == "zero":
        np.testing.assert_allclose(met, w, rtol=1e-3)
    else:
        size = np.linalg.norm(x @ np.asarray(w)) / np.sqrt(np.sum(x**2) / K)
        damped = size + 1e-2 * np.linalg.norm(w)
        assert size * 0.999 < np.linalg.norm(met) < damped


def test_weights_of_rows():
    w = weights(2, 3, 4)
    got = weighted_rows(w, jnp.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(got[0], w[0] * np.array([[0.5], [1.0], [1.5]]), rtol=1e-6)
    np.testing.assert_array_equal(got[1], w[1])


def test_missing_statistics_are_named():
    params = {"w": weights(K, N)}
    for whiten, name in ((True, "moments"), ("scale", "means"), ("fisher", "fisher")):
        with pytest.raises(ValueError, match=rf"measures.{name}\(\) of 'w' of shape \(12, 9\)"):
            jc.compress(params, jc.low_rank(2, whiten=whiten), layout="in,out")
    with pytest.raises(ValueError, match="whiten='both'; it is one of False, True, 'scale'"):
        jc.low_rank(2, whiten="both")
