"""The Fashion-MNIST example trains, stores and measures, on noise instead of its data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from examples import fashion_mnist_qat
from examples.models import resnet


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        # The first and the last layer alone, which compile in seconds.
        patch.setattr(resnet, "MODEL", resnet.ResNet(blocks=()))
        patch.setattr(fashion_mnist_qat, "BATCH", 16)
        yield fashion_mnist_qat


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (64, 28, 28, 1), np.uint8))
    return images, jnp.asarray(rng.integers(0, 10, 64, np.uint8))


@pytest.mark.slow
def test_trained_is_what_is_stored(example, data):
    images = data[0] / np.float32(255)
    variables = jax.jit(resnet.MODEL.init)(jax.random.key(0), images)
    params, averages = variables["params"], variables["batch_stats"]
    c, steps = example.recipes()["w8a8g8"], []
    found = {"uses": jc.uses(resnet.logits, params, averages, images)}
    count = lambda: steps.append(1)
    trained = example.train(params, averages, data, jax.random.key(1), 1, count, c, found)
    params, averages, opt_state, _ = trained
    assert len(steps) == 4

    small = jc.compress(params, c, state=opt_state)
    assert small["stem"]["kernel"].weight.codes.dtype == jnp.int8
    logits = jax.jit(jc.lift(resnet.logits))(c.view(params, opt_state), averages, images)
    right = 100 * np.mean(np.argmax(logits, -1) == np.asarray(data[1]))
    assert example.accuracy(small, averages, data) == right


def test_augmented_images_are_shifted_and_mirrored(example, data):
    out = example.augment(jax.random.key(0), data[0])
    assert out.shape == data[0].shape and out.dtype == jnp.float32
    # Whatever the shift, the middle of each image or of its mirror image stays in sight.
    for image, new in zip(np.asarray(data[0]), np.round(255 * np.asarray(out)), strict=True):
        middles = image[2:-2, 2:-2, 0], image[2:-2, ::-1, 0][:, 2:-2]
        found = np.lib.stride_tricks.sliding_window_view(new[..., 0], (24, 24))
        assert any((found == middle).all((2, 3)).any() for middle in middles)
