"""Products in kernels for TPUs and GPUs: which take them, and that they compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from tests.lift.in_kernels import CASES, FUSED, ON_GPUS, run_as_on
from tests.lift.platforms import KERNEL_CALLS, lowered_for
from tests.quantization.cases import normal

pytestmark = pytest.mark.ci

matmul = lambda params, x: x @ params["w"]


def operands(name):
    w = jnp.asarray(normal(1024, 256), jnp.bfloat16)
    how = (ON_GPUS | FUSED)[name]
    return jc.compress({"w": w}, how), jnp.asarray(normal(16, 1024, seed=1), jnp.bfloat16)


@pytest.mark.ci
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
