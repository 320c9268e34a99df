"""Straight-through derivatives of every format: 1, but 0 where a frozen grid clips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxopt_compress as jc
from jaxopt_compress.arrays.quantized import steps_of
from jaxopt_compress.compression.states import method_states
from jaxopt_compress.numerics.formats import FORMATS
from jaxopt_compress.numerics.groups import spread_to
from jaxopt_compress.numerics.integers import Integers
from tests.quantization import cases
from tests.quantization.cases import each_format

pytestmark = [pytest.mark.ci, pytest.mark.xdist_group("quantization_gradients")]
SIZE = 32
TRAINED = ("int8", "float6_e2m3fn", "nf4", "mxfp4")


@functools.cache
def made():
    """One parameter for each format, on the grid of half of it, so that values are clipped."""
    rng = np.random.default_rng(0)
    params = {}
    for name in FORMATS:
        w = rng.standard_normal((SIZE, SIZE)).astype(np.float32)
        params[name] = jnp.asarray(cases.fitting(name, cases.options(name), w))
    c = jc.chain({name: cases.quantize(name, freeze=0) for name in FORMATS})
    return c, params, c.init(jax.tree.map(lambda w: 0.5 * w, params))


@functools.cache
def expected(name):
    """Which entries are inside, by numpy; and which lie on the border, up to a rounding."""
    _, params, state = made()
    fmt = FORMATS[name]
    (leaf,) = [s.leaves[name] for s in method_states(state) if name in s.leaves]
    scale = leaf.scale
    steps = steps_of(scale)
    steps = np.asarray(spread_to(steps, leaf.cuts, (SIZE, SIZE)))
    ratio = np.asarray(params[name]) * (np.float32(1) / steps)
    if fmt.absmean:
        return np.ones(ratio.shape, bool), np.zeros(ratio.shape, bool)
    if isinstance(fmt.grid, Integers):
        level = np.round(ratio) + (0 if leaf.zero is None else np.float32(leaf.zero))
        inside = (fmt.grid.low <= level) & (level <= fmt.grid.high)
        return inside, np.zeros(ratio.shape, bool)
    return np.abs(ratio) <= fmt.grid.high, np.abs(np.abs(ratio) / fmt.grid.high - 1) < 1e-6


@functools.cache
def derivatives():
    """Pushed and pulled ones of all formats."""
    c, params, state = made()
    tangents = jax.tree.map(lambda w: jnp.full_like(w, 2.5), params)
    view = lambda params: c.apply(params, state)
    pushed = jax.jvp(view, (params,), (tangents,))[1]
    return pushed, jax.vjp(view, params)[1](tangents)[0]


@functools.cache
def trained():
    """Gradients of a network of equal layers, through remat, a scan and vmap, and of its view."""
    _, params, state = made()
    c = jc.chain({name: cases.quantize(name, freeze=0) for name in TRAINED})
    params = {name: params[name] for name in TRAINED}
    state = c.init(jax.tree.map(lambda w: 0.5 * w, params))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, SIZE)).astype(np.float32))

    def network(weights, x):
        layer = lambda x, w: (jnp.tanh(x @ w / SIZE), None)
        outputs = [
            lax.scan(jax.checkpoint(layer), x, jnp.stack([w, w]))[0] for w in weights.values()
        ]
        return sum(jnp.sum(y) for y in outputs)

    loss = lambda params, x: network(c.apply(params, state), x)
    got = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, x)
    want = jax.jit(jax.vmap(jax.grad(network), (None, 0)))(c.apply(params, state), x)
    return got, want


@pytest.mark.ci
@pytest.mark.fast(
    "int8",
    "int3",
    "int1",
    "uint8",
    "uint4",
    "ternary",
    "binary",
    "float8_e4m3fn",
    "float6_e2m3fn",
    "pot4",
    "nf4",
    "odd3",
    "mxfp8",
    "mxfp4",
    "nvfp4",
)
@each_format
def test_pushed_and_pulled(name):
    inside, border = expected(name)
    pushed, pulled = derivatives()
    for got in (pushed[name], pulled[name]):
        np.testing.assert_array_equal(np.asarray(got)[~border], np.where(inside, 2.5, 0)[~border])
        assert np.isin(got, [0, 2.5]).all()
    if not FORMATS[name].absmean:
        # Half of the range leaves out some entries of each format, and never most of them.
        assert 0 < (~inside).sum() < inside.size / 2


@pytest.mark.parametrize("name", TRAINED)
def test_through_remat_scan_and_vmap(name):
    inside, border = expected(name)
    got, want = (np.asarray(x[name]) for x in trained())
    got, want = got[:, ~border], np.where(inside, want, 0)[:, ~border]
    # The same sums, fused differently.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6 * np.abs(want).max())


TOPS = ("float8_e4m3fn", "float8_e5m2", "float6_e2m3fn", "float4_e2m1fn", "pot5", "nf4", "odd4")


@pytest.mark.parametrize("name", TOPS)
def test_what_makes_the_range_is_inside(name):
    """A top level brought to the largest magnitude clips nothing, whatever its ratio rounds to."""
    params = {"w": jnp.asarray(np.random.default_rng(2).standard_normal((32, 256)), jnp.float32)}
    c = cases.quantize(name, freeze=0)
    state = c.init(params)
    slope = jax.grad(lambda p: jnp.sum(c.apply(p, state)["w"]))(params)["w"]
    np.testing.assert_array_equal(slope, jnp.ones_like(slope))


CLIPPING = {
    "int8": {"bounds": jc.bounds.percentile(90)},
    "int4": {"bounds": jc.bounds.moving_average(0.5)},
    "nf4": {"scale_dtype": "float8_e4m3fn", "group_size": 16},
    "mxfp4": {},
    "nvfp4": {},
}


@each_format
def test_grids_that_follow_the_whole_range_clip_nothing(name):
    """Not their largest entries either, nor those that an update made larger than the grid."""
    params = {"w": made()[1][name]}
    c = cases.quantize(name)
    state = c.init(jax.tree.map(lambda w: 0.9 * w, params))
    slope = jax.grad(lambda p: jnp.sum(c.apply(p, state)["w"]))(params)["w"]
    if FORMATS[name].scale.startswith("float8"):
        assert set(np.unique(slope)) == {0.0, 1.0}
    else:
        np.testing.assert_array_equal(slope, jnp.ones_like(slope))


@pytest.mark.parametrize("name", CLIPPING)
def test_grids_of_a_part_of_the_range_clip(name):
    params = {"w": jnp.asarray(np.random.default_rng(2).standard_normal((32, 256)), jnp.float32)}
    c = jc.quantize(name, **CLIPPING[name])
    state = c.init(jax.tree.map(lambda w: 0.9 * w, params))
    slope = jax.grad(lambda p: jnp.sum(c.apply(p, state)["w"]))(params)["w"]
    assert set(np.unique(slope)) == {0.0, 1.0}


@pytest.mark.parametrize("symmetric", [True, False])
def test_derivatives_of_loss(symmetric):
    """Of second order too: the curvature of the loss at the view, inside."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32))
    c = jc.quantize("int4", symmetric=symmetric, freeze=0)
    state = c.init({"w": 0.5 * w})
    scale, zero = state.leaves["w"].scale, state.leaves["w"].zero
    level = np.round(np.asarray(w) / np.asarray(scale)) + (0 if zero is None else np.asarray(zero))
    inside = (-8 <= level) & (level <= 7)
    assert 0 < inside.sum() < inside.size
    view = lambda w: c.apply({"w": w}, state)["w"]
    t = jnp.full_like(w, 2.5)
    curve = jax.jvp(jax.grad(lambda w: jnp.sum(view(w) ** 3)), (w,), (t,))[1]
    np.testing.assert_allclose(curve, np.where(inside, 6 * view(w) * t, 0), rtol=1e-6)


@pytest.mark.parametrize("name", ["binary", "nvfp4"])
def test_the_grid_is_a_constant_for_derivatives(name):
    """Refreshed from the parameters, a step still sends no gradient to them."""
    c = cases.quantize(name)
    w = jnp.asarray(np.random.default_rng(3).standard_normal((SIZE, SIZE)), jnp.float32)

    def loss(w):
        params = {"w": w}
        return jnp.sum(c.apply(params, c.init(params))["w"])

    assert set(np.unique(jax.grad(loss)(w))) <= {0.0, 1.0}


def test_of_16_bits():
    w = np.random.default_rng(4).standard_normal((SIZE, SIZE))
    params = {"a": jnp.asarray(w, jnp.bfloat16), "b": jnp.asarray(w, jnp.float16)}
    c = jc.chain({"a": jc.quantize("int4"), "b": jc.quantize("float8_e4m3fn")})
    state = c.init(jax.tree.map(lambda w: 0.5 * w, params))
    slopes = jax.vjp(lambda p: c.apply(p, state), params)[1](params)[0]
    for slope, w in zip(slopes.values(), params.values(), strict=True):
        assert slope.dtype == w.dtype
        assert ((slope == 0) | (slope == w)).all() and (slope == w).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"activations": "int8"},
        {"backward": jc.backward(residuals="recomputed")},
        {"backward": jc.backward(residuals="unrounded")},
    ],
)
@pytest.mark.parametrize("name", CLIPPING)
def test_what_is_rounded_in_products_clips_alike(name, options):
    """A weight that is rounded where it is used moves where one that is seen rounded does."""
    params = {"w": made()[1][name]}
    plain, own = (jc.quantize(name, **CLIPPING[name], **more) for more in ({}, options))
    moves = []
    for c in (plain, own):
        tx = jc.compressed_training(optax.sgd(1.0), c)
        state = tx.init(params)
        loss = jc.lift(lambda p: jnp.sum(jnp.ones((1, SIZE)) @ p["w"]), on_fallback="error")
        grads = jax.grad(loss)(c.view(params, state))
        moves.append(np.asarray(tx.update(grads, state, params)[0]["w"]) != 0)
    np.testing.assert_array_equal(*moves)
    assert 0 < np.mean(moves[0]) < 1
