"""Functions on arrays with codebooks: the same results, codes where they are stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc

pytestmark = pytest.mark.filterwarnings(
    "ignore::jaxopt_compress.AssumedLayout", "ignore::jaxopt_compress.LargerWarning"
)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def model(params, tokens, images):
    """An embedding that is tied to the head, a scanned stack, a convolution and both layouts."""
    x = params["embed"][tokens]

    def block(x, w):
        return jnp.tanh(x @ w["in"]) @ w["out"].T, None

    x, _ = jax.lax.scan(block, x, params["blocks"])
    dims = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(images, params["conv"], (1, 1), "SAME", dimension_numbers=dims)
    heads = jnp.einsum("btd,hdk->bthk", x, params["heads"])
    return x @ params["embed"].T, y.sum((1, 2)), heads


def trees():
    params = {
        "embed": normal(0, 24, 16),
        "blocks": {"in": normal(1, 3, 16, 8) / 4, "out": normal(2, 3, 16, 8) / 3},
        "conv": normal(3, 3, 3, 2, 4),
        "heads": normal(4, 16, 8).reshape(2, 8, 8)[:, :, :4].repeat(2, 1),
    }
    return params, (jnp.array([[1, 5, 23], [0, 2, 2]]), normal(5, 2, 5, 5, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"clusters": 16}, marks=pytest.mark.ci),
        pytest.param({"clusters": 8, "per": "channel"}, marks=pytest.mark.ci),
        pytest.param({"clusters": 20, "vector": 2}, marks=pytest.mark.ci),
        pytest.param({"clusters": 3, "group_size": 8}, marks=pytest.mark.ci),
    ],
    ids=["scalars", "channels", "vectors", "groups"],
)
def test_any_function(options):
    params, args = trees()
    c = jc.share(**options, where=[p for p in ("embed", "blocks/*", "heads")])
    if "vector" not in options and "group_size" not in options:
        c = jc.chain({"**": jc.share(**options)})
    uses = jc.uses(model, params, *args)
    small = jc.compress(params, c, uses=uses)
    assert small["blocks"]["in"].centroids.shape[0] == 3
    got = jax.jit(jc.lift(model, on_fallback="error"))(small, *args)
    want = jax.jit(model)(jc.materialize(small), *args)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.ci
def test_embeddings_read_the_rows_they_need():
    """No array as large as the table is made, of its values."""
    table = normal(0, 512, 32)
    look_up = lambda params, at: params["w"][at]
    for layout in ("in,out", "out,in"):
        small = jc.compress({"w": table}, jc.share(16), layout=layout)
        lowered = jax.jit(jc.lift(look_up, on_fallback="error")).lower(small, jnp.arange(3))
        assert "512x32xf32" not in lowered.as_text()
        got = jc.lift(look_up)(small, jnp.array([3, 511, -1]))
        np.testing.assert_array_equal(got, jc.materialize(small)["w"][jnp.array([3, 511, -1])])
