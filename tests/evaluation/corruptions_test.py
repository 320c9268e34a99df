"""Corrupted inputs against scipy, and that keys decide them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

import jaxopt_compress as jc
from jaxopt_compress.evaluation.corruptions import check_corruptions, versions

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 12, 10, 2)).astype(np.uint8)


def corrupt(corruption, x, key=KEY, batch=0):
    return dict(versions((x,), {"a": corruption}, key, batch))["a/"][0]


@pytest.mark.parametrize("sigma", [0.7, 3.0])
def test_blur_is_that_of_scipy(sigma):
    x = IMAGES.astype(np.float32)
    want = scipy.ndimage.gaussian_filter(x, sigma, mode="nearest", axes=(1, 2))
    np.testing.assert_allclose(corrupt(jc.corruptions.blur(sigma), x), want, rtol=1e-5)
    in_bytes = corrupt(jc.corruptions.blur(sigma), IMAGES)
    assert in_bytes.dtype == np.uint8
    assert np.abs(np.asarray(in_bytes) - want).max() <= 0.501


def test_noise_and_dropout_have_the_size_that_was_asked_for():
    x = np.ones((100, 100), np.float32)
    noisy, holes = (corrupt(c, x) for c in (jc.corruptions.noise(0.5), jc.corruptions.dropout(0.3)))
    # Four standard errors of 10,000 draws.
    assert abs(float(jnp.std(noisy)) - 0.5) < 4 * 0.5 / np.sqrt(2e4)
    assert abs(float(jnp.mean(holes == 0)) - 0.3) < 4 * np.sqrt(0.21 / 1e4)
    assert set(np.unique(holes)) == {0, 1}
    clipped = corrupt(jc.corruptions.noise(100), np.full((50, 50), 250, np.uint8))
    assert clipped.dtype == np.uint8 and (np.asarray(clipped) == 255).mean() > 0.4


def test_keys_batches_and_names_decide():
    x, noise = np.zeros((4, 4), np.float32), jc.corruptions.noise(1.0)
    first = corrupt(noise, x)
    assert (corrupt(noise, x) == first).all()
    for other in (corrupt(noise, x, jax.random.key(1)), corrupt(noise, x, batch=1)):
        assert (other != first).any()
    both = dict(versions((x,), {"a": noise, "b": noise}, KEY, 0))
    assert (both["a/"][0] != both["b/"][0]).any() and both[""][0] is x


def test_all_metrics_are_measured_under_each_and_tokens_stay():
    fn = lambda params, x, tokens: x + 0 * tokens[..., None]
    batches = [((jnp.eye(4), jnp.arange(4)), jnp.arange(4))]
    under = {"gone": jc.corruptions.dropout(1.0)}
    found = jc.evaluate(fn, {}, batches, ["accuracy", "rmse"][:1], corruptions=under, key=KEY)
    assert found == {"accuracy": 1.0, "gone/accuracy": 0.25}


def test_what_cannot_be_corrupted_is_refused():
    batches = [(jnp.arange(4), jnp.arange(4))]
    under = {"noise": jc.corruptions.noise(1.0)}
    fn = lambda params, x: jnp.eye(4)[x]
    with pytest.raises(ValueError, match="needs a random key"):
        jc.evaluate(fn, {}, batches, ["accuracy"], corruptions=under)
    with pytest.raises(ValueError, match="needs floating inputs"):
        jc.evaluate(fn, {}, batches, ["accuracy"], corruptions=under, key=KEY)
    for make in (lambda: jc.corruptions.noise(-1), lambda: jc.corruptions.dropout(2)):
        with pytest.raises(ValueError):
            make()
    with pytest.raises(ValueError, match="blur along axes"):
        corrupt(jc.corruptions.blur(1.0), jnp.ones((3, 4)))


def test_a_slash_in_the_name_of_a_corruption_is_refused():
    with pytest.raises(ValueError, match="a slash stands before names of figures"):
        check_corruptions({"noise/0.1": jc.corruptions.noise(0.1)}, jax.random.key(0))
