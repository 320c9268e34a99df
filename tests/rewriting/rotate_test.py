"""Rotated functions against the functions themselves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from examples.models import smollm2
from examples.models.common import stack

# Sums of at most some hundred float32 products, in another order.
CLOSE = 1e-5


def llama(width=24, hidden=40, layers=2):
    """Parameters of the model of `examples.models.smollm2`; scales of norms are far from 1."""
    keys = iter(jax.random.split(jax.random.key(0), 99))
    kernel = lambda k, n: {"kernel": jax.random.normal(next(keys), (k, n)) / k**0.5}
    norm = lambda: {"scale": jnp.exp(jax.random.normal(next(keys), (width,)))}

    def layer():
        attention = {"query": kernel(width, 36), "key": kernel(width, 12), "norm": norm()}
        attention |= {"value": kernel(width, 12), "output": kernel(36, width)}
        mlp = {"gate": kernel(width, hidden), "up": kernel(width, hidden), "norm": norm()}
        return {"attention": attention, "mlp": mlp | {"down": kernel(hidden, width)}}

    table = jax.random.normal(next(keys), (50, width)).at[:, 5].mul(30.0)
    body = [layer() for _ in range(layers)]
    return {"tokens": {"embedding": table}, "layers": body, "norm": norm()}


IDS = jnp.arange(12).reshape(2, 6)


class Block(nn.Module):
    """Attention-like products with several axes, and a gated residual."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.DenseGeneral((2, 8), use_bias=False)(nn.RMSNorm()(x))
        x = x + nn.DenseGeneral(16, axis=(-2, -1))(nn.relu(h))
        return x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.RMSNorm()(x)))), None


class Scanned(nn.Module):
    """Embedding, a scan over layers with remat, and a last layer of its own."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(50, 16)(ids)
        scan = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return nn.Dense(5)(nn.RMSNorm()(scan()(x, None)[0]))


@pytest.fixture(scope="module")
def scanned():
    shapes = jax.eval_shape(Scanned().init, jax.random.key(0), IDS)
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(np.exp(rng.normal(size=s.shape)) * 0.3, s.dtype)
    return Scanned().apply, jax.tree.map(draw, shapes)


@pytest.mark.ci
def test_streams_of_a_scanned_linen_model(scanned):
    fn, params = scanned
    rw = jc.rotate(fn, params, IDS)
    assert rw.function(fn) is fn and not rw.turned
    rw.check(fn, IDS, tolerance=CLOSE)
    path = "params/ScanCheckpointBlock_0/DenseGeneral_1/kernel"
    assert rw.axes[path] == {3: 0} and len(rw.axes) == 8
    assert "no operation" in rw.skipped["params/ScanCheckpointBlock_0/Dense_1/bias"]
    back = rw.undo(rw.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), back, params)


@pytest.mark.slow
@pytest.mark.ci
def test_inputs_of_a_scanned_linen_model(scanned):
    fn, params = scanned
    rw = jc.rotate_inputs(fn, params, IDS)
    rw.check(fn, IDS, tolerance=CLOSE)
    block = "params/ScanCheckpointBlock_0"
    assert rw.axes[f"{block}/DenseGeneral_1/kernel"] == (-3, -2)
    assert "gather" in rw.skipped["params/Embed_0/embedding"]
    grads = jax.grad(lambda p: rw.function(fn)(p, IDS).sum())(rw.params)
    want = rw.tree(jax.grad(lambda p: fn(p, IDS).sum())(params))
    kernel = lambda tree: tree["params"]["ScanCheckpointBlock_0"]["Dense_0"]["kernel"]
    scale = float(jnp.abs(kernel(want)).max())
    np.testing.assert_allclose(kernel(grads), kernel(want), atol=1e-4 * scale)


@pytest.mark.ci
@pytest.mark.parametrize("stacked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_tied_embedding_applies_its_last_norm_in_the_original_basis(stacked):
    params = stack(llama()) if stacked else llama()
    rw = jc.rotate(smollm2.apply, params, IDS)
    assert rw.turned == {"norm/scale"} and rw.skipped == {}
    rw.check(smollm2.apply, IDS, tolerance=CLOSE)
    peak = lambda w: float(jnp.abs(w).max() / jnp.sqrt(jnp.mean(w**2)))
    tables = (p["tokens"]["embedding"] for p in (rw.params, params))
    assert peak(next(tables)) < 0.75 * peak(next(tables))


@pytest.mark.slow
@pytest.mark.ci
def test_compressed_behind_a_rotation_runs_on_the_original_function():
    fn = lambda p, x: jax.nn.relu(x @ p["w"].T) @ p["v"]
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], (48, 64)), "v": jax.random.normal(keys[1], (48, 5))}
    x = jax.random.normal(keys[2], (32, 64)).at[:, 3].mul(50.0)
    rw = jc.rotate_inputs(fn, params, x, where="w")
    g = rw.function(fn)
    c = jc.quantize("int8", activations="int4", where="w")
    small = jc.compress(rw.params, c, uses=jc.uses(g, rw.params, x))
    want, got = jc.lift(g)(small, x), jc.lift(fn, on_fallback="error")(rw.undo(small), x)
    np.testing.assert_array_equal(got, want)
    plain = jc.lift(fn)(jc.compress(params, c, uses=jc.uses(fn, params, x)), x)
    error = lambda y: float(jnp.linalg.norm(y - fn(params, x)))
    assert error(got) < 0.5 * error(plain)


def test_layer_norms_and_masks_are_refused():
    def fn(p, x):
        h = x @ p["in"]
        return (h - h.mean(-1, keepdims=True)) @ p["out"]

    p = {"in": jnp.ones((4, 8)), "out": jnp.ones((8, 2))}
    with pytest.raises(ValueError, match="mean over its channels, as of a layer norm"):
        jc.rotate(fn, p, jnp.ones((2, 4)))
    rw = jc.rotate_inputs(fn, p, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"'in' of shape .* was rotated"):
        rw.tree(jax.tree.map(lambda w: w > 0, p))
    with pytest.raises(ValueError, match="odd"):
        jc.rotate_inputs(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, jnp.ones((2, 3)))


def test_a_parameter_used_in_two_ways_blocks_its_stream():
    def fn(p, x):
        h = x @ p["in"]
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True))
        return h @ p["out"], p["out"].sum()

    p = {"in": jnp.ones((4, 8)), "out": jnp.ones((8, 2))}
    with pytest.raises(ValueError, match="'out' is used in another way"):
        jc.rotate(fn, p, jnp.ones((2, 4)))


@pytest.mark.parametrize("rewrite", [jc.rotate, jc.rotate_inputs])
def test_functions_with_static_arguments_are_checked(rewrite):
    def fn(p, x, *, twice):
        h = x @ p["a"]
        return (h + h if twice else h) @ p["b"]

    params, x = {"a": jnp.eye(4), "b": jnp.ones((4, 2))}, jnp.ones((1, 4))
    rw = rewrite(fn, params, x, twice=True)
    assert rw.check(fn, x, twice=False, tolerance=CLOSE).absolute < CLOSE


def test_keys_decide():
    fn, params = lambda p, x: x @ p["w"], {"w": jnp.eye(8)}
    signs = lambda key: jc.rotate_inputs(fn, params, jnp.ones((1, 8)), key=key).signs["w"].ravel()
    assert signs(jax.random.key(1)).tolist() == signs(jax.random.key(1)).tolist()
    assert signs(jax.random.key(1)).tolist() != signs(jax.random.key(2)).tolist()
