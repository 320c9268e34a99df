"""Products in kernels for TPUs and GPUs: which take them, and that they compute the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.kernels import gpu_dots, tpu_dots
from jaxopt_compress.lift import input_products, kernel_products
from tests.lift.platforms import KERNEL_CALLS, lowered_for
from tests.quantization.cases import normal

# Where XLA would write the dense weight: tables, small floats, words of codes, zero points.
FORMS = {
    "nf4": jc.quantize("nf4", group=128),
    "mxfp4": jc.quantize("mxfp4"),
    "nvfp4": jc.quantize("nvfp4"),
    "int4 in groups": jc.quantize("int4", group=128),
    "int8 in groups": jc.quantize("int8", group=128),
    "uint4 in groups": jc.quantize("uint4", group=128, symmetric=False),
    "int3": jc.quantize("int3"),
    "uint5": jc.quantize("uint5", symmetric=False),
    "uint6 in groups": jc.quantize("uint6", group=128, symmetric=False),
    "int3 with zero points": jc.quantize("int3", symmetric=False),
    "binary": jc.quantize("binary"),
    "int3 x int8": jc.quantize("int3", inputs="int8"),
    "binary x int8": jc.quantize("binary", inputs="int8"),
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
    "int4 in groups x int8": jc.quantize("int4", group=128, inputs="int8"),
}
FUSED = {name: jc.quantize(name) for name in ("int8", "float8_e4m3fn")}
CASES = [("tpu", name) for name in FORMS] + [("cuda", name) for name in ON_GPUS]


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
    monkeypatch.setattr(kernel_products, "on_each_platform", there)
    monkeypatch.setattr(input_products, "on_each_platform", there)
    for dots, name in (
        (tpu_dots, "decoded_dot"),
        (gpu_dots, "decoded_dot"),
        (gpu_dots, "integer_dot"),
    ):
        step_by_step = functools.partial(getattr(dots, name), interpret=True)
        monkeypatch.setattr(dots, name, step_by_step)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "pot5"])
def test_relative_steps_stay_in_the_range_of_float16(name, monkeypatch):
    """A level of 448 times a step of 448 would not."""
    w, x = (
        jnp.asarray(normal(*s, seed=i), jnp.float16) for i, s in enumerate(((256, 64), (4, 256)))
    )
    small = jc.compress({"w": w}, jc.quantize(name, group=128, scale="float8_e4m3fn"))
    want = jax.jit(jc.lift(matmul))(small, x).astype(jnp.float32)
    run_as_on("cuda", monkeypatch)
    got = jax.jit(jc.lift(matmul, pallas=True))(small, x).astype(jnp.float32)
    # Weights and both results are rounded to float16.
    scale = np.abs(np.asarray(want)).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=2.0**-10 * scale)


@pytest.mark.parametrize("view", [jnp.transpose, lambda w: w[:, 128:], lambda w: w[:, ::-1]])
def test_views_keep_steps_as_they_are_stored(view):
    small = jc.compress({"w": jnp.asarray(normal(256, 256))}, jc.quantize("mxfp4"))
    kept = jax.jit(jc.lift(lambda params: view(params["w"])))(small)
    assert kept.scale.dtype == jnp.float8_e8m0fnu
    np.testing.assert_array_equal(kept.materialize(), view(small["w"].materialize()))
