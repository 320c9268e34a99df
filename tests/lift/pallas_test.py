"""Products in kernels for TPUs and GPUs: which take them, and that they compute the same."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress import kernels
from jaxopt_compress.kernels import gpu_dots, tpu_dots
from tests.lift.platforms import KERNEL_CALLS, lowered_for
from tests.quantization.cases import normal

pytestmark = pytest.mark.ci

# Where XLA would write the dense weight: tables, small floats, words of codes, zero points.
FORMS = {
    "nf4": jc.quantize("nf4", group_size=128),
    "mxfp4": jc.quantize("mxfp4"),
    "nvfp4": jc.quantize("nvfp4"),
    "int4 in groups": jc.quantize("int4", group_size=128),
    "int8 in groups": jc.quantize("int8", group_size=128),
    "uint4 in groups": jc.quantize("uint4", group_size=128, symmetric=False),
    "int3": jc.quantize("int3"),
    "uint5": jc.quantize("uint5", symmetric=False),
    "uint6 in groups": jc.quantize("uint6", group_size=128, symmetric=False),
    "int3 with zero points": jc.quantize("int3", symmetric=False),
    "binary": jc.quantize("binary"),
    "int4 in groups x int8": jc.quantize("int4", group_size=128, activations="int8"),
    "uint4 in groups x int8": jc.quantize("uint4", 128, symmetric=False, activations="int8"),
    "int3 x int8": jc.quantize("int3", activations="int8"),
    "binary x int8": jc.quantize("binary", activations="int8"),
}
matmul = lambda params, x: x @ params["w"]


def operands(name):
    w = jnp.asarray(normal(1024, 256), jnp.bfloat16)
    how = (ON_GPUS | FUSED)[name]
    return jc.compress({"w": w}, how), jnp.asarray(normal(16, 1024, seed=1), jnp.bfloat16)


# Beyond these, what XLA for GPUs would write out.
ON_GPUS = FORMS | {
    "int4": jc.quantize("int4"),
    "uint8": jc.quantize("uint8", symmetric=False),
    "int2": jc.quantize("int2"),
}
FUSED = {name: jc.quantize(name) for name in ("int8", "float8_e4m3fn")}
# What it fuses or multiplies as it is, but for layers of a stack: these it would cut out, or turn.
IN_STACKS = FUSED | {
    "int8 x int8": jc.quantize("int8", activations="int8"),
    "int4 x int8": jc.quantize("int4", activations="int8"),
    "float8 x float8": jc.quantize("float8_e4m3fn", activations="float8_e4m3fn"),
}
CASES = [("tpu", name) for name in FORMS] + [("cuda", name) for name in ON_GPUS]


@pytest.mark.slow
@pytest.mark.fast(
    "tpu-nf4",
    "tpu-int8 in groups",
    "tpu-int3",
    "tpu-int4 in groups x int8",
    "tpu-binary x int8",
    "cuda-mxfp4",
    "cuda-uint4 in groups",
    "cuda-int3 with zero points",
    "cuda-int4",
    "cuda-int3 x int8",
)
@pytest.mark.parametrize("platform, name", CASES)
def test_lowered_to_a_kernel(platform, name):
    text = lowered(platform, name, pallas=True)
    assert text.count(KERNEL_CALLS[platform]) == 1
    assert KERNEL_CALLS[platform] not in lowered(platform, name)


@pytest.mark.parametrize(
    "platform, name", [("tpu", "int4"), ("cuda", "int8"), ("cuda", "float8_e4m3fn")]
)
def test_what_compilers_fuse_is_left_to_them(platform, name):
    assert KERNEL_CALLS[platform] not in lowered(platform, name, pallas=True)


def lowered(platform, name, **options):
    fn = jax.jit(jc.lift(matmul, **options))
    return lowered_for(platform, fn, *operands(name))


@pytest.mark.fast(
    "tpu-nf4",
    "tpu-uint6 in groups",
    "tpu-int4 in groups x int8",
    "tpu-binary",
    "cuda-nvfp4",
    "cuda-int4 in groups",
    "cuda-int3 x int8",
    "cuda-uint8",
)
@pytest.mark.parametrize("platform, name", CASES)
def test_kernels_compute_the_same(platform, name, monkeypatch):
    small, x = operands(name)
    want = jax.jit(jc.lift(matmul))(small, x).astype(jnp.float32)
    run_as_on(platform, monkeypatch)
    got = jax.jit(jc.lift(matmul, pallas=True))(small, x)
    assert got.dtype == x.dtype
    # Weights are rounded to bfloat16 in the kernel, of which 1024 add up, and both results.
    scale = np.abs(np.asarray(want)).max()
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0, atol=2.0**-7 * scale)


def run_as_on(platform, monkeypatch):
    """Runs the kernels of a platform step by step on this one."""
    there = lambda forms, default, *args: forms.get(platform, default)(*args)
    monkeypatch.setattr(sys.modules[kernels.matmul.__module__], "on_each_platform", there)
    for dots, name in (
        (tpu_dots, "decoded_dot"),
        (tpu_dots, "integer_dot"),
        (gpu_dots, "decoded_dot"),
        (gpu_dots, "integer_dot"),
    ):
        kernel = getattr(dots, name)
        step_by_step = lambda *a, kernel=kernel, **given: kernel(*a, **given | {"interpret": True})
        monkeypatch.setattr(dots, name, step_by_step)


def product(x, layer):
    return x @ layer["w"].astype(x.dtype)


def one_layer(x, layer):
    return jnp.tanh(product(x, layer))


def stack(step=one_layer):
    """A scan over layers, the last one first."""

    def run(params, x):
        return jax.lax.scan(lambda x, layer: (step(x, layer), None), x, params, reverse=True)[0]

    return run


def in_either_branch(x, layer):
    return jax.lax.cond(x[0, 0] < 9, one_layer, lambda x, layer: -one_layer(x, layer), x, layer)


def split_and_joined(x, layer):
    return one_layer(x, {"w": layer["w"].reshape(2, 128, 256).reshape(256, 256)})


def nested(params, x):
    inner = lambda x, layers: (stack()(layers, x), None)
    pairs = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), params)
    return jax.lax.scan(inner, x, pairs, reverse=True)[0]


def loop(params, x):
    take = functools.partial(jax.lax.dynamic_index_in_dim, params["w"], keepdims=False)
    return jax.lax.fori_loop(0, 4, lambda i, x: one_layer(x, {"w": take(3 - i)}), x)


def no_loop(params, x):
    return functools.reduce(lambda x, i: one_layer(x, {"w": params["w"][i]}), (3, 2, 1, 0), x)


WITHIN = {
    "scan": stack(),
    "remat": stack(jax.checkpoint(one_layer)),
    "jit": stack(jax.jit(one_layer)),
    "a branch": stack(in_either_branch),
    "a reshape": stack(split_and_joined),
    "nested scans": nested,
    "a loop": loop,
    "no loop": no_loop,
}


QUICK = ("nf4", "nvfp4", "int3 with zero points", "int4 in groups x int8")


@pytest.mark.fast(
    "tpu-mxfp4",
    "tpu-int3",
    "tpu-uint4 in groups x int8",
    "cuda-nf4",
    "cuda-int8 in groups",
    "cuda-binary x int8",
)
@pytest.mark.parametrize(
    "platform, name",
    [pytest.param(*case, marks=[] if case[1] in QUICK else pytest.mark.slow) for case in CASES],
)
def test_layers_are_read_where_they_lie(platform, name, monkeypatch):
    check_layers(platform, name, stack(), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_STACKS)
def test_only_of_a_stack_are_they_read_in_a_kernel(name, monkeypatch):
    run = lambda params, x: jax.lax.map(lambda layer: product(x, layer), params)
    small, x = compressed_stack("cuda", name, run)
    step = jax.jit(jc.lift(product, pallas=True))
    layers = [jax.tree.map(lambda a, i=i: a[i], small) for i in range(4)]
    assert KERNEL_CALLS["cuda"] not in lowered_for("cuda", step, x, layers[0])
    want = jnp.stack([step(x, layer) for layer in layers]).astype(jnp.float32)
    run_as_on("cuda", monkeypatch)
    got = jax.jit(jc.lift(run, pallas=True))(small, x).astype(jnp.float32)
    # Rounded to bfloat16 once there and twice here; and sums to float32.
    np.testing.assert_allclose(got, want, rtol=3 * 2.0**-8, atol=2.0**-16)


@pytest.mark.slow
@pytest.mark.fast(
    "scan-tpu",
    "remat-cuda",
    "a branch-tpu",
    "a reshape-cuda",
    "nested scans-tpu",
    "a loop-cuda",
    "no loop-tpu",
    "jit-cuda",
)
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("run", WITHIN.values(), ids=WITHIN)
def test_layers_are_found_again_within(platform, run, monkeypatch):
    check_layers(platform, "nf4", run, monkeypatch)


@pytest.mark.slow
@pytest.mark.fast("tpu-nf4", "tpu-int4 in groups x int8", "cuda-int8 x int8")
@pytest.mark.parametrize(
    "platform, name",
    [
        *(("tpu", n) for n in ("nf4", "int4 in groups x int8")),
        *(("cuda", n) for n in ("nvfp4", "int8 x int8", "float8 x float8")),
    ],
)
def test_gradients_through_stacks_in_kernels(platform, name, monkeypatch):
    """Of an activation and of steps, those of the same products without kernels."""
    check_gradients(platform, stack(), *compressed_stack(platform, name, stack()), monkeypatch)


def check_gradients(platform, run, small, x, monkeypatch):
    floats, rest = jc.partition(small)

    def gradients(**options):
        fn = jc.lift(run, "error", **options)
        loss = lambda floats, x: (fn(jc.combine(floats, rest), x).astype(jnp.float32) ** 2).sum()
        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(floats, x))

    expected = gradients()
    run_as_on(platform, monkeypatch)
    for own, want in zip(gradients(pallas=True), expected, strict=True):
        own, want = np.asarray(own, np.float32), np.asarray(want, np.float32)
        # Four layers, the results of which are rounded apart, to 8 bits and to bfloat16.
        assert np.linalg.norm(own - want) < 2.0**-4 * np.linalg.norm(want)


def compressed_stack(platform, name, run):
    """Four layers and an activation, of which a kernel reads the layers where they lie."""
    params = {"w": jnp.asarray(normal(4, 256, 256) / 16)}
    x = jnp.asarray(normal(16, 256, seed=1), jnp.bfloat16)
    small = jc.compress(params, (ON_GPUS | IN_STACKS)[name], uses=jc.uses(run, params, x))
    text = lowered_for(platform, jax.jit(jc.lift(run, pallas=True)), small, x)
    calls = [line for line in text.splitlines() if KERNEL_CALLS[platform] in line]
    codes = jax.tree.leaves(small["w"])[0]
    assert calls
    for call in calls:
        assert f"tensor<4x{codes.shape[1]}x256x" in call
    return small, x


def check_layers(platform, name, run, monkeypatch):
    small, x = compressed_stack(platform, name, run)
    run_as_on(platform, monkeypatch)
    got = jax.jit(jc.lift(run, pallas=True))(small, x)
    step = jax.jit(jc.lift(one_layer, pallas=True))
    for i in (3, 2, 1, 0):
        x = step(x, jax.tree.map(lambda a, i=i: a[i], small))
    np.testing.assert_array_equal(got, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float8_e4m3fn", "pot5"])
def test_relative_steps_stay_in_the_range_of_float16(name, monkeypatch):
    """A level of 448 times a step of 448 would not."""
    w, x = (
        jnp.asarray(normal(*s, seed=i), jnp.float16) for i, s in enumerate(((256, 64), (4, 256)))
    )
    small = jc.compress({"w": w}, jc.quantize(name, group_size=128, scale_dtype="float8_e4m3fn"))
    want = jax.jit(jc.lift(matmul))(small, x).astype(jnp.float32)
    run_as_on("cuda", monkeypatch)
    got = jax.jit(jc.lift(matmul, pallas=True))(small, x).astype(jnp.float32)
    # Weights and both results are rounded to float16.
    scale = np.abs(np.asarray(want)).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=2.0**-10 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("view", [jnp.transpose, lambda w: w[:, 128:], lambda w: w[:, ::-1]])
def test_views_keep_steps_as_they_are_stored(view):
    small = jc.compress({"w": jnp.asarray(normal(256, 256))}, jc.quantize("mxfp4"))
    kept = jax.jit(jc.lift(lambda params: view(params["w"])))(small)
    assert kept.scale.dtype == jnp.float8_e8m0fnu
    np.testing.assert_array_equal(kept.materialize(), view(small["w"].materialize()))
