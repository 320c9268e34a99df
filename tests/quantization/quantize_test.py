"""Where steps come from: channels, groups and tiles, and what holds them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.arrays.quantized import steps_of
from jaxopt_compress.numerics.formats import FORMATS
from jaxopt_compress.tree import named_leaves
from tests.models import CASES
from tests.quantization.cases import normal, view

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


def absmax(w, axes):
    return np.abs(np.asarray(w, np.float32)).max(axes, keepdims=True)


@functools.cache
def case(name):
    fn, params, args = next(c for c in CASES if c.name == name).make()
    return params, jc.uses(fn, params, *args)


@pytest.mark.parametrize("name", ["linen_conv_net", "linen_scanned_transformer"])
def test_channels_follow_the_function(name):
    params, uses = case(name)
    state = jax.eval_shape(lambda p: jc.quantize("int8").init(p, uses=uses), params)
    answers = next(c for c in CASES if c.name == name).uses
    shapes = dict(named_leaves(params))
    for path, found in answers.items():
        products = [use for use in found if use.op != "gather"]
        if products:
            use = products[0]
            shape = shapes[path].shape
            want = tuple(1 if d - len(shape) in use.contracting else n for d, n in enumerate(shape))
            assert state.leaves[path].scale.shape == want, path


def test_assumed_axes_are_named():
    params = {"heads": jnp.ones((4, 2, 3)), "w": W}
    with pytest.warns(jc.AssumedLayout, match="assumed the axes of heads, w "):
        jc.quantize("int8").init(params)


def test_one_step_where_nothing_is_contracted():
    params = {"bias": jnp.array([1.0, -2.0, 0.5]), "gain": jnp.float32(3)}
    small = jc.compress(params, jc.quantize("int8", where=["bias", "gain"]))
    assert small["bias"].scale.shape == (1,) and small["gain"].scale.shape == ()
    assert abs(float(small["gain"].materialize()) - 3) < 3 / 127


@pytest.mark.parametrize(
    ("name", "given", "shape", "steps"),
    [
        ("int4", {}, (64, 8), (1, 8)),
        ("int4", {"group_size": (16, 4)}, (64, 8), (4, 2)),
        ("int4", {"group_size": (None, 4)}, (64, 8), (1, 2)),
        ("int4", {"group_size": (16, 3), "pad": True}, (52, 8), (4, 3)),
        ("int4", {"group_size": 128, "pad": True}, (52, 8), (1, 8)),
        ("mxfp4", {}, (64, 8), (2, 8)),
        ("nvfp4", {}, (64, 8), (4, 8)),
        ("binary", {"group_size": 16}, (64, 8), (4, 8)),
    ],
)
def test_steps_are_of_the_range_of_each_group(name, given, shape, steps):
    w = normal(*shape)
    scale = jc.quantize(name, **given).init({"w": w}).leaves["w"].scale
    assert scale.shape == steps
    rows, columns = (-(-n // s) for n, s in zip(shape, steps, strict=True))
    group = given.get("group_size")
    along, across = group if isinstance(group, tuple) else (group, None)
    along, across = along or FORMATS[name].group or rows, across or columns
    wide = np.zeros((steps[0] * along, steps[1] * across), np.float32)
    wide[: shape[0], : shape[1]] = w
    tiles = np.abs(wide.reshape(steps[0], along, steps[1], across))
    fmt = FORMATS[name]
    if fmt.absmean:
        want = tiles.astype(float).mean((1, 3))
    elif fmt.scale == "float8_e8m0fnu":
        want = 2.0 ** (np.floor(np.log2(tiles.max((1, 3)))) - 2)
    else:
        want = tiles.max((1, 3)) / np.float32(fmt.top)
    tolerance = {"float8_e4m3fn": 2.0**-4}.get(fmt.scale, 1e-6)
    np.testing.assert_allclose(steps_of(scale), want, rtol=tolerance)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e8m0fnu", "float8_e4m3fn"])
def test_steps_in_shorter_floats(dtype):
    params = {"w": normal(64, 8)}
    whole = jc.quantize("int4", 16).init(params).leaves["w"].scale
    scale = jc.quantize("int4", 16, scale_dtype=dtype).init(params).leaves["w"].scale
    assert scale.dtype == dtype or scale.codes.dtype == dtype
    stored = np.asarray(steps_of(scale), np.float64)
    ratio = stored / np.asarray(whole, np.float64)
    if dtype == "float8_e8m0fnu":
        assert (np.log2(stored) % 1 == 0).all()
        # Brought to the binade of 7.5, 4 to 8.
        assert (ratio > 7.5 / 8 - 1e-6).all() and (ratio <= 7.5 / 4 + 1e-6).all()
    else:
        bits = {"bfloat16": 8, "float16": 11, "float8_e4m3fn": 4}[dtype]
        assert (np.abs(ratio - 1) <= 2.0**-bits).all()


@pytest.mark.parametrize("name", ["int8", "nf4", "float4_e2m1fn", "ternary"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_steps_in_shorter_floats_cover_all_sizes(name, dtype):
    """Steps beyond the range of float16 or bfloat16 give neither NaN nor infinity."""
    w = normal(64, 8)
    w = w / jnp.max(jnp.abs(w))
    wrong = []
    for size in np.float32([1e-30, 1e-6, 1e-2, 1, 1e4, 1e6, 1e37, 3e38]):
        got = np.asarray(view(jc.quantize(name, scale_dtype=dtype), w * size), np.float64) / size
        error = np.linalg.norm(got - w) / np.linalg.norm(w)
        # Float4 may be off by a quarter of a value, ternary by all of a small one. Float16 has
        # steps between 6e-5 and 65504, in full precision; those over 2^126 give zeros.
        near = error < (0.7 if name == "ternary" else 0.2)
        held = 1e-2 <= size <= 1e4 if dtype == "float16" else size <= 1e37
        if not np.isfinite(got).all() or (held and not near):
            wrong.append((float(size), error))
    assert not wrong


@pytest.mark.parametrize("name", ["nvfp4", "int4"])
def test_a_group_of_zeros_leaves_the_other_steps_alone(name):
    """What stands for the step of nothing takes no part in the step that all share."""
    w = normal(64, 8) * 1e-5
    c = jc.quantize(name, 16, scale_dtype="float8_e4m3fn")
    # The same largest magnitudes, so the same step for all.
    beside = view(c, w.at[16:32].set(0))
    np.testing.assert_array_equal(beside[:16], view(c, w)[:16])
    np.testing.assert_array_equal(beside[16:32], 0)


def test_stacks_have_steps_of_their_own():
    """Also of the float32 step that float8 steps share."""
    w = normal(3, 64, 8) * jnp.array([1.0, 1e-4, 100]).reshape(3, 1, 1)
    c = jc.quantize("nvfp4")
    with pytest.warns(jc.AssumedLayout):
        state = c.init({"w": w})
    assert state.leaves["w"].scale.scale.shape == (3, 1, 1)
    for i in range(3):
        np.testing.assert_array_equal(c.apply({"w": w}, state)["w"][i], view(c, w[i]))


@pytest.mark.parametrize(("format", "zeros"), [("int8", -5), ("int4", 5), ("uint2", 0)])
def test_zeros_stay_zeros_with_a_zero_point(format, zeros):
    w = normal(64, 8) + zeros
    w = jnp.where(w > zeros, w, 0.0)
    small = jc.compress({"w": w}, jc.quantize(format, symmetric=False))["w"]
    assert not np.any(np.asarray(small.materialize())[np.asarray(w) == 0])


@pytest.mark.parametrize("name", ["int4", "ternary", "binary", "nf4", "odd4", "mxfp4", "nvfp4"])
def test_nothing_is_near_nothing(name):
    """What has no range takes no value of the size of others, in formats without a zero either."""
    w = normal(64, 8).at[:, 2].set(0).at[16:48, 5].set(0)
    got = np.asarray(view(jc.quantize(name, 16), w))
    assert np.abs(got[:, 2]).max() < 1e-30 and np.abs(got[16:48, 5]).max() < 1e-30


def test_values_of_a_constant():
    """One value everywhere is kept by its own zero point, if by any."""
    for format, symmetric in [("int8", False), ("uint1", False), ("binary", True), ("nf4", True)]:
        w = jnp.full((64, 8), 2.0).at[:, ::2].multiply(-1)
        got = view(jc.quantize(format, symmetric=symmetric), w)
        np.testing.assert_allclose(got, w, rtol=1e-6)


@pytest.mark.parametrize(
    "bounds",
    [jc.bounds.percentile(95), jc.bounds.mse(20), jc.bounds.entropy(128)],
    ids=["percentile", "mse", "entropy"],
)
def test_ranges_of_groups(bounds):
    """Each group has the range that it has alone; under jit up to a fused multiplication."""
    w = jnp.asarray(np.random.default_rng(0).standard_t(3, (64, 8)), jnp.float32)
    c = jc.quantize("int4", 16, bounds=bounds)
    state = c.init({"w": w})
    got = np.asarray(state.leaves["w"].scale)
    parts = w.reshape(4, 16, 8).swapaxes(1, 2).reshape(32, 16).T
    alone = jc.quantize("int4", bounds=bounds).init({"w": parts}).leaves["w"].scale
    np.testing.assert_array_equal(got, np.asarray(alone).reshape(4, 8))
    assert (got <= absmax(w.reshape(4, 16, 8), 1)[:, 0] / 7.5 * 1.000001).all()
    jitted = jax.jit(c.init)({"w": w}).leaves["w"]
    np.testing.assert_array_max_ulp(np.asarray(jitted.scale), got, 1)


def test_mse_errs_least():
    """Less than the whole range, and than any other part of it."""
    w = jnp.asarray(np.random.default_rng(1).standard_t(3, (64, 8)), jnp.float32)
    error = lambda c: float(jnp.sum((view(c, w) - w) ** 2))
    best = error(jc.quantize("int3", bounds=jc.bounds.mse()))
    assert best < 0.9 * error(jc.quantize("int3"))
    for percent in (90, 99):
        assert best <= error(jc.quantize("int3", bounds=jc.bounds.percentile(percent)))


def test_codes_of_a_small_matrix():
    small = jc.compress({"w": W}, jc.quantize("int4"))["w"]
    np.testing.assert_array_equal(small.scale, np.float32([[4, 3, 1]]) / np.float32(7.5))
    want = np.round(np.asarray(W) * (np.float32(1) / np.asarray(small.scale)))
    np.testing.assert_array_equal(small.codes.astype(jnp.int8), np.clip(want, -8, 7))


@pytest.mark.parametrize("name", ["int4", "nf4", "float8_e4m3fn"])
def test_a_normalization_has_nothing_to_fold(name):
    """With a step per channel, a factor per channel changes the steps, and no code."""
    w, factor = normal(3, 3, 8, 16), 2.0 ** np.arange(-8, 8)
    image = lambda params, x: jax.lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    uses = jc.uses(image, {"w": w}, jnp.ones((1, 6, 6, 8)))
    plain, folded = (
        jc.compress({"w": v}, jc.quantize(name), uses=uses)["w"] for v in (w, w * factor)
    )
    np.testing.assert_array_equal(plain.unpacked(), folded.unpacked())
    np.testing.assert_array_equal(plain.scale * factor, folded.scale)
