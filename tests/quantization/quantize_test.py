import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxopt_compress as jc
from jaxopt_compress.numerics.formats import format_of
from jaxopt_compress.quantization import fake_quantize
from jaxopt_compress.tree import named_leaves
from tests.models import CASES

# In the oracles' answers below, each column is a channel.
W = jnp.array(
    [
        [1.5, -3.0, 0.25],
        [-2.0, 0.75, 0.125],
        [0.5, 2.5, -1.0],
        [4.0, -0.1, 0.7],
        [0.0, 1.25, -0.3],
        [-0.0, -1.75, 0.9],
    ]
)


@pytest.mark.parametrize(
    ("config", "codes", "scale"),
    [
        # qwix 0.1.8: quantize(w, config, channelwise_axes=[1], tiled_axes={0: group}).
        (
            ("int8", None),
            [
                [48, -127, 32],
                [-64, 32, 16],
                [16, 106, -127],
                [127, -4, 89],
                [0, 53, -38],
                [0, -74, 115],
            ],
            [[0.0313725508749485, 0.02352941408753395, 0.007843137718737125]],
        ),
        (
            ("int4", None),
            [[3, -7, 2], [-4, 2, 1], [1, 6, -7], [7, 0, 5], [0, 3, -2], [0, -4, 7]],
            [[0.5333333611488342, 0.40000003576278687, 0.13333334028720856]],
        ),
        (
            ("int2", None),
            [[1, -2, 0], [-1, 0, 0], [0, 1, -2], [1, 0, 1], [0, 1, 0], [0, -1, 1]],
            [[2.6666667461395264, 2.0, 0.6666666865348816]],
        ),
        (
            ("int4", 3),
            [[6, -7, 2], [-7, 2, 1], [2, 6, -7], [7, 0, 6], [0, 5, -2], [0, -8, 7]],
            [
                [0.2666666805744171, 0.40000003576278687, 0.13333334028720856],
                [0.5333333611488342, 0.23333334922790527, 0.12000000476837158],
            ],
        ),
    ],
)
def test_codes_and_scales_of_qwix(config, codes, scale):
    small = jc.compress({"w": W}, jc.quantize(*config))["w"]
    # One unit in the last place: the peer multiplies by a reciprocal.
    np.testing.assert_array_max_ulp(np.asarray(small.scale), np.float32(scale), maxulp=1)
    ours = np.asarray(small.integers().astype(jnp.int8))
    # Largest magnitudes lie on the border of two codes (half a step beyond the last one), where
    # that unit decides.
    levels = np.asarray(W) / np.repeat(np.float32(scale), 6 // len(scale), 0)
    border = np.abs(np.abs(levels) % 1 - 0.5) <= 4 * np.spacing(np.abs(levels))
    np.testing.assert_array_equal(ours[~border], np.asarray(codes)[~border])
    assert np.abs(ours - codes).max() <= 1


def test_asymmetric_codes_of_qwix():
    # qwix 0.1.8: quantize(w, "int4", channelwise_axes=[1], calibration_method="minmax").
    small = jc.compress({"w": W}, jc.quantize("int4", symmetric=False))["w"]
    np.testing.assert_array_max_ulp(
        np.asarray(small.scale),
        np.float32([[0.40000003576278687, 0.36666667461395264, 0.12666666507720947]]),
    )
    np.testing.assert_array_equal(small.zero, [[-3, 0, 0]])
    want = [[1, -8, 2], [-8, 2, 1], [-2, 7, -8], [7, 0, 6], [-3, 3, -2], [-3, -5, 7]]
    np.testing.assert_array_equal(small.integers().astype(jnp.int8), want)


def test_straight_through_gradients_of_torchao():
    # torchao 0.18.0, torch 2.13.0: IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4,
    # group_size=3, is_symmetric=True, is_dynamic=False)) with all scales 0.25, on W.T; the
    # gradient of (y * [[1, ..., 6], [7, ..., 12], [13, ..., 18]]).sum().
    view = [
        [1.5, -2.0, 0.5, 1.75, 0.0, 0.0],
        [-2.0, 0.75, 1.75, 0.0, 1.25, -1.75],
        [0.25, 0.0, -1.0, 0.75, -0.25, 1.0],
    ]
    slope = [[1, 2, 3, 0, 5, 6], [0, 8, 0, 10, 11, 12], [13, 14, 15, 16, 17, 18]]
    fake = lambda w: fake_quantize(w, jnp.full((3, 1), 0.25), None, format_of("int4"))
    got, pull = jax.vjp(fake, W.T)
    np.testing.assert_array_equal(got, view)
    np.testing.assert_array_equal(pull(jnp.arange(1.0, 19).reshape(3, 6))[0], slope)


def test_dynamic_gradients_of_torchao():
    # torchao 0.18.0: IntxFakeQuantizeConfig(torch.int4, group_size=4, is_symmetric=True).
    w = jnp.array([[7, -7.5, 3.25, 0.5], [-7.5, 7.5, 1, -1]]).T
    c = jc.quantize("int4")
    state = c.init({"w": w})
    view, pull = jax.vjp(lambda w: c.apply({"w": w}, state)["w"], w)
    np.testing.assert_array_equal(view.T, [[7, -8, 3, 0], [-8, 7, 1, -1]])
    np.testing.assert_array_equal(pull(jnp.ones_like(w))[0].T, [[1, 1, 1, 1], [1, 0, 1, 1]])


@pytest.mark.parametrize("symmetric", [True, False])
def test_derivatives_are_the_definition(symmetric):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32))
    c = jc.quantize("int4", symmetric=symmetric)
    state = c.init({"w": 0.5 * w})  # So that some entries are clipped.
    scale, zero = state.leaves["w"].scale, state.leaves["w"].zero
    level = np.round(np.asarray(w) / np.asarray(scale)) + (0 if zero is None else np.asarray(zero))
    inside = (-8 <= level) & (level <= 7)
    assert 0 < inside.sum() < inside.size
    view = lambda w: c.apply({"w": w}, state)["w"]
    t = jnp.full_like(w, 2.5)
    np.testing.assert_array_equal(jax.jvp(view, (w,), (t,))[1], np.where(inside, 2.5, 0))
    np.testing.assert_array_equal(jax.vjp(view, w)[1](t)[0], np.where(inside, 2.5, 0))

    loss = lambda w: jnp.sum(view(w) ** 3)
    curve = jax.jvp(jax.grad(loss), (w,), (t,))[1]
    np.testing.assert_allclose(curve, np.where(inside, 6 * view(w) * t, 0), rtol=1e-6)

    def layer(x, w):
        return jnp.tanh(x @ view(w)[:4]), None

    def deep(w, x):
        return jnp.sum(lax.scan(jax.checkpoint(layer), x, jnp.stack([w, w]))[0])

    xs = jnp.asarray(np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32))
    got = jax.jit(jax.vmap(jax.grad(deep), (None, 0)))(w, xs)

    def plain(v, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ v[:4]) @ v[:4]))

    want = np.stack([jax.grad(plain)(view(w), x) for x in xs])
    np.testing.assert_allclose(got, np.where(inside, want, 0), rtol=1e-5, atol=1e-6)


def test_the_grid_is_a_constant_for_derivatives():
    """Refreshed from the parameters, a scale still sends no gradient to them."""
    c = jc.quantize("int8")

    def loss(w):
        params = {"w": w}
        return jnp.sum(c.apply(params, c.init(params))["w"])

    assert set(np.unique(jax.grad(loss)(W))) <= {0.0, 1.0}


@pytest.mark.parametrize(("format", "zeros"), [("int8", -5), ("int4", 5), ("int2", 0)])
def test_zeros_stay_zeros_with_a_zero_point(format, zeros):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)) + zeros
    w = jnp.where(w > zeros, w, 0.0)
    small = jc.compress({"w": w}, jc.quantize(format, symmetric=False))["w"]
    assert not np.any(np.asarray(small.materialize())[np.asarray(w) == 0])


def test_one_scale_where_nothing_is_contracted():
    params = {"bias": jnp.array([1.0, -2.0, 0.5]), "gain": jnp.float32(3)}
    small = jc.compress(params, jc.quantize("int8", where="*"))
    assert small["bias"].scale.shape == (1,) and small["gain"].scale.shape == ()
    assert abs(float(small["gain"].materialize()) - 3) < 3 / 127


@functools.cache
def case(name):
    fn, params, args = next(c for c in CASES if c.name == name).make()
    return params, jc.uses(fn, params, *args)


@pytest.mark.parametrize("name", ["linen_conv_net", "linen_scanned_transformer"])
def test_channels_follow_the_function(name):
    params, uses = case(name)
    small = jc.compress(params, jc.quantize("int8"), uses=uses)
    answers = next(c for c in CASES if c.name == name).uses
    leaves = dict(named_leaves(small))
    for path, found in answers.items():
        products = [use for use in found if use.op != "gather"]
        if products:
            use = products[0]
            shape = leaves[path].shape
            want = tuple(1 if d - len(shape) in use.contracting else n for d, n in enumerate(shape))
            assert leaves[path].scale.shape == want, path


def test_assumed_axes_are_named():
    params = {"heads": jnp.ones((4, 2, 3)), "w": W}
    with pytest.warns(jc.AssumedLayout, match="assumed the axes of heads "):
        jc.quantize("int8").init(params)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jc.quantize("int5"), ValueError, "'int5'; there are int8, int4, int2"),
        (lambda: jc.quantize("int4", group=0), ValueError, "group=0.*at least one"),
        (
            lambda: jc.quantize("int4", group=4).init({"a": {"w": W}}),
            ValueError,
            r"group=4 .* 'a/w' of shape \(6, 3\), of length 6; .* 2, 3, 6",
        ),
        (
            lambda: jc.quantize("int4", group=2, where="b").init({"b": jnp.ones(4)}),
            ValueError,
            r"'b' of shape \(4,\) has no contracted axis to group; leave group out",
        ),
        (
            lambda: jc.quantize("int4", where="i*").init({"ids": jnp.arange(4)}),
            TypeError,
            r"'ids' of shape \(4,\) and dtype int32: only floating leaves.*exclude",
        ),
        (
            lambda: jc.quantize("int4").init({"bias": jnp.ones(3)}),
            ValueError,
            "no floating leaf of rank 2 or more among bias",
        ),
        (
            lambda: jc.quantize("int4").init(jc.compress({"w": W}, jc.quantize("int8"))),
            TypeError,
            r"'w' of shape \(6, 3\) is already a QuantizedArray.*materialize it",
        ),
    ],
)
def test_errors_name_path_shape_and_what_works(call, error, message):
    with pytest.raises(error, match=message):
        call()
