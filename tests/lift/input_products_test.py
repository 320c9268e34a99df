"""Products of quantized activations: against exact integers, over the zoo, and in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from jaxopt_compress.arrays import FakeQuantizedArray, InputQuantizedArray, is_compressed
from tests.array_contract import assert_same_bits
from tests.lift.compressed import assert_close, made
from tests.quantization.learned import train

rng = np.random.default_rng(0)
W = jnp.asarray(rng.normal(size=(32, 24)) / 6, jnp.float32)
X = jnp.asarray(rng.normal(size=(5, 32)), jnp.float32)
dense = lambda params, x: x @ params["w"]


def exact(x, small, step):
    """The product of codes in 64-bit integers and floats, from the definition."""
    weight = small.weight
    low, high = (0, 15) if small.format == "uint4" else (-128, 127)
    rows = np.clip(np.round(np.asarray(x) * (np.float32(1) / step)), low, high).astype(np.int64)
    levels = np.asarray(weight.levels(), np.float64)
    return (rows @ levels) * np.float64(step) * np.asarray(weight.steps(), np.float64)


SYMMETRIC = [(name, True) for name in ("int8", "int4", "int3", "ternary")]
ASYMMETRIC = [(name, False) for name in ("int8", "int4", "uint8", "uint4")]


@pytest.mark.parametrize(("name", "symmetric"), SYMMETRIC + ASYMMETRIC)
def test_integers_against_exact_sums(name, symmetric):
    c = jc.quantize(name, symmetric=symmetric, activations="int8")
    small = jc.compress({"w": W}, c)
    got = jax.jit(jc.lift(dense, on_fallback="error"))(small, X)
    step = np.abs(np.asarray(X)).max(1, keepdims=True) / np.float32(127.5)
    want = exact(X, small["w"], step)
    # Sums are exact; what follows is three roundings.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_the_program_multiplies_integers():
    for name, operand in (("int8", "xi8>"), ("int4", "xi4>")):
        small = jc.compress({"w": W}, jc.quantize(name, activations="int8"))
        staged = jax.jit(jc.lift(dense)).trace(small, X)
        # Where the hardware multiplies them; a CPU's products of int4 are widened first.
        text = staged.lower(lowering_platforms=("tpu",)).as_text()
        (product,) = [line for line in text.splitlines() if "dot_general" in line]
        assert "(tensor<5x32xi8>" in product and f"tensor<32x24{operand}" in product
        assert "tensor<5x24xi32>" in product


@pytest.mark.parametrize(
    "weight, inputs, group",
    [("nf4", "int8", 8), ("int4", "int8", 16), ("float8_e4m3fn", "float8_e4m3fn", None)],
)
def test_other_pairs_meet_as_levels(weight, inputs, group):
    small = jc.compress({"w": W}, jc.quantize(weight, group, activations=inputs))
    rounded = jc.quantize_array(X, inputs, axis=-1).materialize()
    want = rounded @ jc.materialize(small)["w"]
    got = jax.jit(jc.lift(dense, on_fallback="error"))(small, X)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_calibrated_steps_cover_what_was_seen():
    batches = [X, 2 * X]
    stats = jc.calibrate(dense, {"w": W}, batches)
    c = jc.quantize("int8", activations=jc.activations("int8", "calibrated"))
    small = jc.compress({"w": W}, c, stats=stats)
    step = np.asarray(small["w"].scale)
    assert step.shape == (1, 1)
    np.testing.assert_allclose(step, 2 * np.abs(X).max() / 127.5, rtol=1e-6)
    got = jax.jit(jc.lift(dense))(small, X)
    want = exact(X, small["w"], step)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
    with pytest.raises(ValueError, match=r"'w' of shape \(32, 24\).*calibrate"):
        jc.compress({"w": W}, c)


def test_stacked_layers_have_steps_of_their_own():
    params = {"w": jnp.stack([W[:, :8], W[:, 8:16], W[:, 16:]]).reshape(3, 32, 8)}
    params["w"] = jnp.concatenate([params["w"]] * 4, -1)

    def run(params, x):
        return jax.lax.scan(lambda x, w: (4 * x @ w, None), x, params["w"])[0]

    uses, stats = jc.uses(run, params, X), jc.calibrate(run, params, [X])
    c = jc.quantize("int8", activations=jc.activations("int8", "calibrated"))
    small = jc.compress(params, c, uses=uses, stats=stats)
    assert small["w"].scale.shape == (3, 1, 1) and len(set(np.ravel(small["w"].scale))) == 3
    got = jax.jit(jc.lift(run, on_fallback="error"))(small, X)
    want = run(jc.materialize(small), X)
    assert jnp.linalg.norm(got - want) < 0.02 * jnp.linalg.norm(want)


def test_gradients_are_straight_through():
    """Those of the rounded activation times the weight, nothing where it was clipped."""
    c = jc.quantize("int8", activations=jc.activations("int4", "calibrated"))
    small = jc.compress({"w": W}, c, stats=jc.calibrate(dense, {"w": W}, [X / 2]))
    step = small["w"].scale[0, 0]
    inside = (X / step >= -8) & (X / step <= 7)
    assert 0 < jnp.mean(inside) < 1
    cotangent = jnp.cos(jnp.arange(5.0 * 24)).reshape(5, 24)
    run = jc.lift(dense)
    (got,) = jax.jit(lambda x: jax.vjp(lambda x: run(small, x), x)[1](cotangent))(X)
    want = jnp.where(inside, cotangent @ jc.materialize(small)["w"].T, 0)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    _, forward = jax.jvp(lambda x: run(small, x), (X,), (jnp.ones_like(X),))
    want = jnp.where(inside, 1.0, 0.0) @ jc.materialize(small)["w"]
    np.testing.assert_allclose(forward, want, rtol=0, atol=1e-5)


ZOO = [
    "linen_conv_net",
    "linen_attention",
    "linen_tied_embedding",
    "linen_gru",
    "linen_scanned_transformer",
    "nnx_conv_net",
    "equinox_conv_attention",
    "haiku_lstm",
    "einsum_experts",
    "conv_grouped",
    "vmap_models",
    "ragged_dot",
]


@pytest.mark.ci
@pytest.mark.fast(
    "linen_attention", "linen_scanned_transformer", "haiku_lstm", "conv_grouped", "ragged_dot"
)
@pytest.mark.parametrize("name", ZOO)
def test_models(name):
    """Integer products agree with those of the same rounded activations in floating point."""
    fn, params, args, uses = made(name)
    c = jc.quantize("int8", activations="int8")
    small = jax.jit(lambda params: c.compress(params, c.init(params, uses=uses)))(params)
    holds = lambda x: isinstance(x, InputQuantizedArray)
    floating = jax.tree.map(
        lambda x: dataclasses.replace(x, weight=x.weight.materialize()) if holds(x) else x,
        small,
        is_leaf=is_compressed,
    )
    run = jax.jit(jc.lift(fn, on_fallback="error"))
    got, want, whole = run(small, *args), run(floating, *args), fn(params, *args)
    for a, b, c in zip(*map(jax.tree.leaves, (got, want, whole)), strict=True):
        size = np.linalg.norm(c) + 1e-3
        # An activation at a tie may fall to either side, by one code of 255, in every layer.
        assert np.linalg.norm(a - b) <= 0.02 * size
        assert np.linalg.norm(a - c) <= 0.1 * size


@pytest.mark.ci
@pytest.mark.parametrize("symmetric", [True, False])
def test_training(symmetric):
    """Trains through integer products, stores what was trained, and runs it."""
    params = {"w": W, "b": jnp.zeros(24)}
    c = jc.quantize("int4", group_size=8, symmetric=symmetric, activations="int8", where="w")
    tx = jc.compressed_training(optax.adam(1e-2), c)
    state = tx.init(params)
    target = jnp.sin(jnp.arange(5.0 * 24)).reshape(5, 24)
    forward = lambda params, x: jnp.tanh(x @ params["w"]) + params["b"]
    params, state, values = train(c, tx, state, params, X, target, forward=forward)
    assert values[-1] < 0.7 * values[0]
    small, view = jc.compress(params, c, state=state), c.view(params, state)
    assert isinstance(view["w"].weight, FakeQuantizedArray)
    assert_same_bits(small["w"].materialize(), view["w"].materialize())
    # The codes found again from the values are the stored ones, so the products are the same.
    assert_same_bits(view["w"].weight.quantized().codes, small["w"].weight.codes)
    run = jax.jit(jc.lift(forward))
    assert_close(run(small, X), run(view, X))


def test_a_loss_that_is_not_lifted_is_refused():
    c = jc.quantize("int8", activations="int8")
    tx = jc.compressed_training(optax.sgd(0.1), c)
    view = c.view({"w": W}, tx.init({"w": W}))
    with pytest.raises(TypeError, match="argument of a lifted function"):
        dense(view, X)


def test_teacher_and_student_do_not_leak():
    small = jc.compress({"w": W}, jc.quantize("int4", activations="int4"))
    run = jax.jit(jc.lift(dense))
    teacher = jax.jit(dense)({"w": W}, X)
    student = run(small, X)
    assert_same_bits(jax.jit(dense)({"w": W}, X), teacher)
    assert_same_bits(run(small, X), student)
    assert_same_bits(run({"w": W}, X), teacher)
    assert not np.array_equal(teacher, student)


@pytest.mark.ci
def test_nothing_follows_rounded_inputs_in_a_chain():
    rounded = jc.quantize("int8", activations="int8")
    pruned = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5))
    with pytest.raises(
        ValueError, match=r"prune cannot follow quantize at .w.* it has to come last"
    ):
        jc.chain(rounded, pruned).init({"w": W})
    small = jc.compress({"w": W}, jc.chain(pruned, rounded))
    got = jax.jit(jc.lift(dense))(small, X)
    want = X @ jc.materialize(small)["w"]
    assert jnp.linalg.norm(got - want) < 0.02 * jnp.linalg.norm(want)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"activations": "mxfp4"}, "one scale per row"),
        ({"activations": {"format": "int8", "step": "static"}}, "'dynamic', 'calibrated'"),
        ({"activations": "int8", "begin": 5}, "begin"),
        ({"activations": "nope"}, "unknown number format 'nope'"),
    ],
)
def test_options_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        jc.quantize("int8", **given)


def test_sharded_and_saved(tmp_path):
    small = jc.compress({"w": W}, jc.quantize("int8", activations="int8"))
    jc.save(tmp_path / "small", small)
    back = jc.load(tmp_path / "small")
    assert type(back["w"]) is InputQuantizedArray and back["w"].format == "int8"
    run = jax.jit(jc.lift(dense))
    assert_same_bits(run(back, X), run(small, X))
    mesh = jax.make_mesh((8,), ("x",))
    spec = jax.sharding.PartitionSpec(None, "x")
    placed = jc.shard(small, {"w": jax.sharding.NamedSharding(mesh, spec)})
    assert_same_bits(run(placed, X), run(small, X))


def test_more_codes_than_int32_sums():
    """Their sums, of one sign, are as large as a few distinct codes make them."""
    depth = 180001
    w = jnp.ones((depth, 1)).at[::3].set(0.5)
    x = jnp.ones((2, depth)).at[:, ::3].set(0.75)
    small = jc.compress({"w": w}, jc.quantize("int8", activations="int8"))
    want = exact(x, small["w"], np.float32(1) / np.float32(127.5))
    for rows in (1, 2):
        got = jax.jit(jc.lift(dense, on_fallback="error"))(small, x[:rows])
        np.testing.assert_allclose(got, want[:rows], rtol=1e-6)


@pytest.mark.parametrize("groups, window", [(1, (1, 1)), (2, (2, 1))])
def test_convolutions_of_more_codes_than_int32_sums(groups, window):
    params = {"w": jnp.ones((*window, 180000 // window[0], groups)).at[..., ::3, :].set(0.5)}
    x = jnp.ones((2, *window, 180000 // window[0] * groups))

    def image(params, x):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "VALID", dimension_numbers=names, feature_group_count=groups
        )

    uses = jc.uses(image, params, x)
    small = jc.compress(params, jc.quantize("int8", activations="int8"), uses=uses)
    got = jax.jit(jc.lift(image, on_fallback="error"))(small, x)
    weight = small["w"].weight
    sums = 127 * np.asarray(weight.levels(), np.int64).sum((0, 1, 2))
    assert np.all(sums >= 2**31)
    want = sums / 127.5 * np.asarray(weight.steps(), np.float64).reshape(-1)
    np.testing.assert_allclose(got, np.broadcast_to(want, (2, 1, 1, groups)), rtol=1e-6)


@pytest.mark.ci
@pytest.mark.parametrize("layout", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")])
def test_few_channels_of_a_convolution_are_those_of_many(layout):
    """Kernels with few channels are widened for CPUs, which changes no bit."""
    first = layout[1].index("O")
    w, x = rng.normal(size=(3, 3, 8, 20)), rng.normal(size=(2, 5, 5, 8))
    if first == 0:
        w, x = np.transpose(w, (3, 2, 0, 1)), np.transpose(x, (0, 3, 1, 2))
    w, x = jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)

    def image(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=layout
        )

    def run(params):
        uses = jc.uses(image, params, x)
        small = jc.compress(params, jc.quantize("int8", activations="int8"), uses=uses)
        return jax.jit(jc.lift(image, on_fallback="error"))(small, x)

    few = jax.lax.slice_in_dim(w, 0, 12, axis=first)
    want = jax.lax.slice_in_dim(run({"w": w}), 0, 12, axis=layout[2].index("C"))
    assert_same_bits(run({"w": few}), want)
