"""Weights that lie as `[out, in]`, as Equinox has them and tied embeddings, in kernels."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from tests.lift.in_kernels import CASES, IN_STACKS, ON_GPUS, check_gradients, run_as_on
from tests.lift.platforms import KERNEL_CALLS, lowered_for
from tests.quantization.cases import normal

pytestmark = pytest.mark.ci

linear = lambda params, x: x @ params["w"].T


def stacked(params, x):
    step = lambda x, layer: (jnp.tanh(linear(layer, x)), None)
    return jax.lax.scan(step, x, params)[0]


def each_layer(params, x):
    return jax.lax.map(lambda layer: linear(layer, x), params)


def heads(params, x):
    return jnp.einsum("bk,hdk->bhd", x, params["w"])


def tied(params, x):
    tokens = jnp.argmax(x[:, :8], axis=1)
    return (x + params["w"][tokens]) @ params["w"].T


def given(how, fn, *shape):
    """Stored parameters and an activation."""
    params = {"w": jnp.asarray(normal(*shape) / 16, jnp.bfloat16)}
    x = jnp.asarray(normal(16, shape[-1], seed=1), jnp.bfloat16)
    how = (ON_GPUS | IN_STACKS).get(how, how)
    return jc.compress(params, how, uses=jc.uses(fn, params, x)), x


def operands_of_kernels(platform, fn, small, x):
    """The shapes of what kernels read, as MLIR writes them."""
    text = lowered_for(platform, jax.jit(jc.lift(fn, pallas=True)), small, x)
    calls = [line for line in text.splitlines() if KERNEL_CALLS[platform] in line]
    return [re.findall(r"tensor<([0-9x]+)x\w+>", call) for call in calls]


def check(platform, fn, small, x, monkeypatch):
    """A kernel reads the codes as they lie, and computes what is computed without one."""
    codes = jax.tree.leaves(small["w"])[0].shape
    rows = codes if fn in (stacked, each_layer) else (1, -1, codes[-1])
    read = "x".join(map(str, np.empty(codes, bool).reshape(rows).shape))
    calls = operands_of_kernels(platform, fn, small, x)
    assert calls and all(read in shapes for shapes in calls)
    want = jax.jit(jc.lift(fn))(small, x).astype(jnp.float32)
    run_as_on(platform, monkeypatch)
    got = jax.jit(jc.lift(fn, pallas=True))(small, x)
    assert got.dtype == x.dtype
    if fn is stacked:
        step = jax.jit(jc.lift(lambda layer, x: jnp.tanh(linear(layer, x)), pallas=True))
        for i in range(4):
            x = step(jax.tree.map(lambda a, i=i: a[i], small), x)
        return np.testing.assert_array_equal(got, x)
    # Weights are rounded to bfloat16 in the kernel, of which 1024 add up, and both results.
    scale = np.abs(np.asarray(want)).max()
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0, atol=2.0**-7 * scale)


@pytest.mark.ci
@pytest.mark.fast(
    "tpu-nf4",
    "tpu-uint6 in groups",
    "tpu-int4 in groups x int8",
    "cuda-int3",
    "cuda-mxfp4",
    "cuda-int2",
)
@pytest.mark.parametrize("platform, name", CASES)
def test_formats(platform, name, monkeypatch):
    check(platform, linear, *given(name, linear, 256, 1024), monkeypatch)


@pytest.mark.ci
@pytest.mark.fast("tpu-int3", "cuda-nf4")
@pytest.mark.parametrize(
    "platform, name",
    [
        *(("tpu", n) for n in ("mxfp4", "int3", "int4 in groups x int8")),
        *(("cuda", n) for n in ("nf4", "int8 in groups", "int4 in groups x int8")),
    ],
)
def test_stacks(platform, name, monkeypatch):
    size = 1024 if name == "int3" else 256
    check(platform, stacked, *given(name, stacked, 4, size, size), monkeypatch)


@pytest.mark.fast("int8", "int4 x int8")
@pytest.mark.parametrize("name", IN_STACKS)
def test_what_is_in_a_kernel_as_part_of_a_stack_alone(name, monkeypatch):
    check("cuda", each_layer, *given(name, each_layer, 4, 256, 256), monkeypatch)


@pytest.mark.ci
@pytest.mark.fast("heads-shape0-tpu", "tied-shape1-cuda")
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("fn, shape", [(heads, (4, 64, 512)), (tied, (256, 512))])
def test_other_uses(platform, fn, shape, monkeypatch):
    check(platform, fn, *given("nf4", fn, *shape), monkeypatch)


def test_what_a_kernel_has_no_tiles_for_is_turned(monkeypatch):
    """Rows of 288 words would not lie in whole registers."""
    small, x = given("int3", linear, 256, 768)
    assert "1x288x256" in operands_of_kernels("tpu", linear, small, x)[0]
    want = jax.jit(jc.lift(linear))(small, x)
    run_as_on("tpu", monkeypatch)
    got = jax.jit(jc.lift(linear, pallas=True))(small, x)
    np.testing.assert_allclose(got, want, rtol=0, atol=2.0**-7 * np.abs(want).max())


def test_xla_for_tpus_fuses_tables_of_whole_rows():
    given_so = given(jc.quantize("nf4"), linear, 256, 1024)
    assert not operands_of_kernels("tpu", linear, *given_so)
    assert operands_of_kernels("cuda", linear, *given_so)


@pytest.mark.ci
@pytest.mark.fast("tpu-mxfp4", "cuda-int8")
@pytest.mark.parametrize("platform, name", [("tpu", "mxfp4"), ("cuda", "int8"), ("cuda", "nf4")])
def test_gradients(platform, name, monkeypatch):
    check_gradients(platform, stacked, *given(name, stacked, 4, 256, 256), monkeypatch)
