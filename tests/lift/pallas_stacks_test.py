"""Layers of a stack in kernels for TPUs and GPUs, which read them where they lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from tests.lift.in_kernels import CASES, IN_STACKS, ON_GPUS, check_gradients, run_as_on
from tests.lift.platforms import KERNEL_CALLS, lowered_for
from tests.quantization.cases import normal

pytestmark = pytest.mark.ci


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


@pytest.mark.ci
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


@pytest.mark.ci
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
