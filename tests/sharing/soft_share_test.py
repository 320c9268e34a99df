"""Soft sharing: the likelihood by SciPy, and a training that finds values and zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats

import jaxopt_compress as jc
from jaxopt_compress.numerics.mixtures import Mixture, most_likely, negative_log_likelihood

pytestmark = pytest.mark.filterwarnings(
    "ignore::jaxopt_compress.AssumedLayout", "ignore::jaxopt_compress.LargerWarning"
)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.ci
def test_the_likelihood_is_that_of_scipy_for_each_book():
    x, mixture = normal(0, 2, 30), Mixture(normal(1, 2, 4), normal(2, 2, 4), normal(3, 2, 4))
    for book in range(2):
        means, scales, logits = (np.asarray(a[book], float) for a in mixture)
        means[0] = 0
        shares = np.log(special.softmax(logits))
        terms = shares + stats.norm.logpdf(np.asarray(x[book])[:, None], means, np.exp(scales))
        want = -special.logsumexp(terms, 1).sum()
        np.testing.assert_allclose(negative_log_likelihood(x, mixture)[book], want, rtol=1e-5)
        np.testing.assert_array_equal(most_likely(x, mixture)[book], terms.argmax(1))


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_first_means_are_relative_to_the_entries(scale):
    c, w = jc.soft_share(4, zeros=0.5), normal(8, 8, 6)
    first = lambda w: c.apply({"w": w}, c.init({"w": w}))["w"]
    np.testing.assert_allclose(first(w * scale) / scale, first(w), rtol=1e-6)
    alike = jnp.full((4, 3), scale, jnp.float32)
    np.testing.assert_allclose(first(alike), alike, rtol=1e-6)


@pytest.mark.ci
def test_training_finds_few_values_and_zeros():
    """A regression by weights of -1, 0 and 1: entries come to lie at the means that are stored."""
    rng = np.random.default_rng(4)
    truth = jnp.asarray(rng.choice([-1.0, 0.0, 1.0], (16, 8), p=[0.15, 0.7, 0.15]), jnp.float32)
    x = normal(5, 256, 16)
    y = x @ truth + 0.3 * normal(6, 256, 8)
    c = jc.soft_share(4, zeros=0.7)
    tx = jc.compressed_training(optax.adam(1e-2), c, optax.adam(5e-3), penalty=1e-4)
    params = {"w": truth + 0.3 * normal(7, 16, 8)}

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(lambda v: jnp.mean((x @ v["w"] - y) ** 2))(c.view(params, opt_state))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for _ in range(600):
        params, opt_state = step(params, opt_state)
    small = jc.compress(params, c, state=opt_state)["w"]
    found = np.asarray(small.materialize())
    assert small.codes.shape[0] < 16 and len(np.unique(found)) <= 4
    np.testing.assert_array_equal(found == 0, truth == 0)
    np.testing.assert_allclose(found, truth, atol=0.15)


def test_refusals():
    with pytest.raises(ValueError, match=r"clusters=1, zeros=0\.9"):
        jc.soft_share(1)
    with pytest.raises(TypeError, match=r"write compressed_training\(penalty=\)"):
        jc.soft_share(tau=0.005)  # pyright: ignore


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_nan_stays_visible(value):
    c = jc.soft_share(4, zeros=0.5)
    params = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)}
    state = c.update(c.init(params), {"w": params["w"].at[0, 0].set(value)})
    assert bool(jnp.isnan(c.apply(params, state)["w"][0, 0]))
