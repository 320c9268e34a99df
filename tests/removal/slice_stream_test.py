"""Streams cut to principal directions, beside projections by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from examples.models import smollm2
from tests.rewriting.rotate_test import IDS, llama

# Sums of at most some hundred float32 products, in another order.
CLOSE = 1e-4


@pytest.mark.ci
def test_the_stream_of_a_language_model():
    params = llama()
    stats = jc.calibrate(smollm2.apply, params, [(IDS,)])
    rw = jc.slice_stream(smollm2.apply, params, IDS, stats=stats, keep=0.7, round_to=2)
    assert isinstance(rw, jc.Rewrite)
    assert rw.kept["tokens/embedding"] == {1: (16, 24)}
    layer = rw.params["layers"][0]
    assert layer["attention"]["query"]["kernel"].shape == (16, 36)
    assert layer["mlp"]["down"]["kernel"].shape == (40, 16)
    rw.check(smollm2.apply, IDS, tolerance=CLOSE)
    # Writers are projected: their rows lie in 16 dimensions.
    table = np.asarray(rw.undo(rw.params)["tokens"]["embedding"])
    assert np.linalg.matrix_rank(table, tol=1e-3) == 16


@pytest.mark.ci
def test_principal_directions_by_numpy():
    """Of one stream, read once: the least squared error of what is read."""

    def fn(p, x):
        h = x @ p["w"]
        normed = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True)) * p["scale"]
        return jnp.tanh(normed @ p["v"])

    rng = np.random.default_rng(0)
    draw = lambda *n: jnp.asarray(rng.standard_normal(n), jnp.float32)
    params = {"w": draw(6, 9), "scale": jnp.exp(draw(9)), "v": draw(9, 4)}
    x = draw(50, 6)
    rw = jc.slice_stream(fn, params, x, stats=jc.calibrate(fn, params, [x]), keep=4 / 9)
    h = np.asarray(x @ params["w"])
    h = h / np.sqrt(np.mean(h**2, -1, keepdims=True))
    q = np.linalg.eigh(h.T @ h)[1][:, :-5:-1]
    want = np.asarray(params["w"]) @ q @ q.T
    np.testing.assert_allclose(rw.undo(rw.params)["w"], want, atol=1e-5)
    exact = jc.slice_stream(fn, params, x, stats=jc.calibrate(fn, params, [x]), keep=1.0)
    exact.check(fn, x, tolerance=CLOSE)
    np.testing.assert_allclose(exact.function(fn)(exact.params, x), fn(params, x), atol=1e-4)


def test_refusals():
    fn = lambda p, x: x @ p["w"] @ p["v"]
    params, x = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}, jnp.ones((1, 3))
    with pytest.raises(ValueError, match=r"keep=1.5; it is the share"):
        jc.slice_stream(fn, params, x, stats={}, keep=1.5)
    with pytest.raises(
        ValueError, match=r"second moments of what reads the stream of \['v', 'w'\]"
    ):
        jc.slice_stream(fn, params, x, stats={})


@pytest.mark.ci
def test_moments_that_are_not_finite_are_refused_and_float64_keeps_its_digits():
    fn = lambda p, x: (
        (lambda h: h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True)))(x @ p["w"]) @ p["v"]
    )
    rng = np.random.default_rng(0)
    w, v, x = (rng.standard_normal(n) for n in ((6, 8), (8, 4), (50, 6)))
    params = {"w": jnp.asarray(w, jnp.float32), "v": jnp.asarray(v, jnp.float32)}
    bad = jc.calibrate(fn, params, [jnp.asarray(x, jnp.float32).at[0, 0].set(jnp.nan)])
    with pytest.raises(ValueError, match=r"'v' along axis 0 are NaN or infinite"):
        jc.slice_stream(fn, params, jnp.asarray(x, jnp.float32), stats=bad, keep=0.5)
    with jax.enable_x64(True):
        wide = {"w": jnp.asarray(w), "v": jnp.asarray(v)}
        rw = jc.slice_stream(fn, wide, x, stats=jc.calibrate(fn, wide, [x]), keep=1.0)
        np.testing.assert_allclose(rw.undo(rw.params)["w"], w, atol=1e-12)
