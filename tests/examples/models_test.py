"""The models of the examples: shapes, uses and compressed weights, and figures on real data."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from examples.fetching import DataError
from examples.models import efficientnet, lenet, minilm, resnet, smollm2, vit
from examples.models.common import int8, stack
from jaxopt_compress.tree import named_leaves

WIDTH = 12
NORM = {"scale": (WIDTH,), "bias": (WIDTH,)}
SQUARE = {"kernel": (WIDTH, WIDTH)}
DENSE = SQUARE | {"bias": (WIDTH,)}
TABLE = {"embedding": (WIDTH, WIDTH)}
PROJECTIONS = ("query", "key", "value", "output")


def filled(shapes):
    """Weights of these shapes, by NumPy, which compiles nothing; scales and variances near 1."""
    rng = np.random.default_rng(0)

    def fill(path, shape):
        shape = getattr(shape, "shape", shape)
        around = 1 if path[-1].key in ("scale", "var") else 0
        return jnp.asarray(around + rng.uniform(-0.5, 0.5, shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes, is_leaf=lambda x: isinstance(x, tuple))


def encoder():
    """MiniLM with two narrow layers."""
    attention = dict.fromkeys(PROJECTIONS, DENSE) | {"norm": NORM}
    layer = {"attention": attention, "mlp": {"up": DENSE, "down": DENSE, "norm": NORM}}
    embeddings = dict.fromkeys(("word", "position", "type"), TABLE) | {"norm": NORM}
    return {"embeddings": embeddings, "layers": [layer, layer]}


def decoder():
    """SmolLM2 with two narrow layers."""
    scale = {"scale": (WIDTH,)}
    # Nine heads of two, and three of them that are keys.
    wide, thin = {"kernel": (WIDTH, 18)}, {"kernel": (WIDTH, 6)}
    attention = {"query": wide, "key": thin, "value": thin, "output": {"kernel": (18, WIDTH)}}
    layer = {
        "attention": attention | {"norm": scale},
        "mlp": dict.fromkeys(("gate", "up", "down"), SQUARE) | {"norm": scale},
    }
    return {"tokens": TABLE, "layers": [layer, layer], "norm": scale}


def convolutions():
    """EfficientNet with one block of each kind."""
    norm = NORM | {"mean": (WIDTH,), "var": (WIDTH,)}
    conv = lambda size, inputs: {"kernel": (size, size, inputs, WIDTH), "norm": norm}
    thin = {"depthwise": conv(3, 1), "project": conv(1, WIDTH)}
    blocks = [thin, thin | {"expand": conv(1, WIDTH)}]
    return {"stem": conv(3, 3), "blocks": blocks, "top": conv(1, WIDTH), "head": DENSE}


KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, WIDTH, (2, 9)).astype(np.int32)
IDS[0, -2:] = 0
IMAGES = RNG.integers(0, 256, (2, 28, 28)).astype(np.uint8)
COLORED = RNG.integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
RESNET = resnet.ResNet(blocks=((16, 2),))


def small_resnet(variables, images):
    return RESNET.apply(variables, images[..., None] / jnp.float32(255))


# Name -> function, shapes of its parameters, input, weights, and the shape of the output.
CASES = {
    "minilm": (minilm.apply, encoder, IDS, minilm.WEIGHTS, (2, WIDTH)),
    "smollm2": (smollm2.apply, decoder, IDS, smollm2.WEIGHTS, (2, 9, WIDTH)),
    "efficientnet": (
        functools.partial(efficientnet.apply, strides=(2, 1)),
        convolutions,
        COLORED,
        efficientnet.WEIGHTS,
        (2, WIDTH),
    ),
    "lenet_300_100": (
        lenet.apply_300_100,
        lambda: jax.eval_shape(lenet.init_300_100, KEY),
        IMAGES,
        lenet.WEIGHTS,
        (2, 10),
    ),
    "lenet_5": (
        lenet.apply_5,
        lambda: jax.eval_shape(lenet.init_5, KEY),
        IMAGES,
        lenet.WEIGHTS,
        (2, 10),
    ),
    "resnet": (
        small_resnet,
        lambda: jax.eval_shape(RESNET.init, KEY, jnp.zeros((1, 28, 28, 1))),
        IMAGES,
        resnet.WEIGHTS,
        (2, 10),
    ),
    "vit": (
        vit.apply,
        lambda: jax.eval_shape(functools.partial(vit.init, width=16, depth=1), KEY),
        IMAGES,
        vit.WEIGHTS,
        (2, 10),
    ),
}


@pytest.mark.ci
@pytest.mark.fast("minilm", "smollm2", "efficientnet")
@pytest.mark.parametrize("name", CASES)
def test_compressed_weights_run_as_stored(name):
    apply, shapes, inputs, where, shape = CASES[name]
    params = filled(shapes())
    uses = jc.uses(apply, params, inputs)
    kernels = [path for path, _ in named_leaves(params) if path.endswith("kernel")]
    assert kernels and all(uses[path] and uses[path][0].flops > 0 for path in kernels)
    small = int8(apply, params, (inputs,), where)
    assert all(isinstance(dict(named_leaves(small))[p], jc.QuantizedArray) for p in kernels)
    out = jax.jit(jc.lift(apply, on_fallback="error"))(small, inputs)
    assert out.shape == shape and out.dtype == jnp.float32
    expected = jax.jit(apply)(jc.materialize(small), inputs)
    # Sums of up to some hundred products are taken in another order, layer after layer.
    np.testing.assert_allclose(out, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.ci
@pytest.mark.fast("minilm")
@pytest.mark.parametrize("name", ["minilm", "smollm2", "vit"])
def test_stacked_layers_are_the_same_function(name):
    apply, shapes, inputs, where, _ = CASES[name]
    params = filled(shapes())
    scanned = stack(params)
    expected = jax.jit(apply)(params, inputs)
    found = jax.jit(apply)(scanned, inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5 * abs(expected).max())
    small = int8(apply, scanned, (inputs,), where)
    assert small["layers"]["mlp"]["up"]["kernel"].codes.ndim == 3
    out = jax.jit(jc.lift(apply, on_fallback="error"))(small, inputs)
    each = jax.jit(apply)(jc.materialize(small), inputs)
    np.testing.assert_allclose(out, each, atol=2e-4 * abs(each).max())


def test_padding_changes_no_sentence():
    params, run = filled(encoder()), jax.jit(minilm.apply)
    out = run(params, np.pad(IDS, ((0, 0), (0, 3))))
    np.testing.assert_allclose(out, run(params, IDS), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(out, axis=-1), 1, rtol=1e-6)


def test_tokens_see_no_later_ones():
    params, run = filled(decoder()), jax.jit(smollm2.apply)
    changed = np.concatenate([IDS[:, :5], (IDS[:, 5:] + 1) % WIDTH], axis=1)
    a, b = run(params, IDS), run(params, changed)
    np.testing.assert_allclose(a[:, :5], b[:, :5], atol=1e-5)
    assert np.abs(a[:, 5:] - b[:, 5:]).max() > 1e-2


def test_rotations_depend_on_distances_alone():
    query, key = np.random.default_rng(0).normal(size=(2, 8)).astype("f4")
    turn = jax.jit(smollm2.rotated)
    turned = [np.asarray(turn(np.tile(x, (1, 6, 1, 1)))[0, :, 0]) for x in (query, key)]
    products = turned[0] @ turned[1].T
    for distance in range(-5, 6):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert np.ptp(products) > 0.1


def test_ridge_regression_is_that_of_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = np.random.default_rng(0).normal(size=(60, 5)).astype("f4"), np.arange(60) % 3
    kernel, bias = efficientnet.ridge(x, y, 0.1)
    expected = linear.Ridge(alpha=0.1 * 60).fit(x, np.eye(3)[y])
    np.testing.assert_allclose(kernel, expected.coef_.T, atol=1e-5)
    np.testing.assert_allclose(bias, expected.intercept_, atol=1e-5)


def figures(name, *args):
    """What the example prints, unless its data or a package that reads it is missing."""
    module = importlib.import_module(f"examples.models.{name}")
    try:
        return module.main(*args)
    except (DataError, ModuleNotFoundError) as error:
        pytest.skip(re.sub(r"\s+", " ", str(error)))


@pytest.mark.slow
def test_minilm_correlates_with_people():
    found = figures("minilm")
    assert found["float32"]["spearman"] == pytest.approx(0.8203, abs=5e-5)
    assert found["int8"]["spearman"] == pytest.approx(0.8203, abs=1e-3)


@pytest.mark.slow
def test_efficientnet_has_features_for_clothes():
    found = figures("efficientnet")
    # One image is 0.001.
    assert found["float32"]["accuracy"] == pytest.approx(0.861, abs=3e-3)
    assert found["int8"]["accuracy"] > 0.84 and found["int8"]["agreement"] > 0.93


@pytest.mark.slow
def test_smollm2_reads_news():
    found = figures("smollm2", ("news",))["news"]
    assert found["float32"]["perplexity"] == pytest.approx(33.4, abs=0.05)
    assert found["int8"]["perplexity"] == pytest.approx(33.4, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"), [("lenet", 0.97), ("resnet", 0.85), ("vit", 0.78)], ids=str
)
def test_trained_models_classify(name, least):
    found = figures(name, 1)
    for each in found.values() if name == "lenet" else [found]:
        assert each["float32"]["accuracy"] > least
        assert abs(each["int8"]["accuracy"] - each["float32"]["accuracy"]) < 5e-3
