"""Lifted functions inside of a shard_map, where each device has a part of the stored weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc
from tests.lift.platforms import H100, KERNEL_CALLS, lowered_for
from tests.quantization.cases import normal

FORMS = {
    "int8": jc.quantize("int8"),
    "int4 in groups": jc.quantize("int4", group_size=32),
    "uint4 with zero points": jc.quantize("uint4", group_size=32, symmetric=False),
    "nf4": jc.quantize("nf4", group_size=128),
    "int3": jc.quantize("int3"),
    "int8 x int8": jc.quantize("int8", activations="int8"),
    "low rank": jc.low_rank(rank=16),
    "pruned": jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), "2:4"),
}
COLUMNS, ROWS = P(None, "model"), P("model", None)
matmul = lambda params, x: x @ params["w"]


AXES = {"axis_names": ("data", "model"), "axis_types": (AxisType.Auto,) * 2}


def split(fn, w, spec, mesh=None):
    """``fn(params, x)`` with the stored weight split as ``spec`` says, and rows of ``x`` too."""
    mesh = mesh or jax.make_mesh((2, 4), **AXES)

    def part(params, x):
        y = fn(params, x)
        return lax.psum(y, "model") if spec[0] else y

    given = {"w": w.specs(spec)}, P("data", spec[0])
    return jax.jit(jax.shard_map(part, mesh=mesh, in_specs=given, out_specs=P("data", spec[1])))


OTHERS = ("uint4 with zero points", "nf4", "int3", "pruned")
KINDS = [pytest.param(name, marks=pytest.mark.slow if name in OTHERS else []) for name in FORMS]


@pytest.mark.ci
@pytest.mark.fast(
    "int8-columns",
    "int4 in groups-rows",
    "uint4 with zero points-columns",
    "nf4-rows",
    "int3-columns",
    "int8 x int8-rows",
    "low rank-columns",
    "pruned-rows",
)
@pytest.mark.parametrize("spec", [COLUMNS, ROWS], ids=["columns", "rows"])
@pytest.mark.parametrize("name", KINDS)
def test_products_of_parts(name, spec):
    w, x = jnp.asarray(normal(512, 256)), jnp.asarray(normal(8, 512, seed=1))
    small = jc.compress({"w": w}, FORMS[name])
    fn = jc.lift(matmul, on_fallback="error")
    want = fn(small, x)
    got = split(fn, small["w"], spec)(small, x)
    # Sums in another order; by rows, activations have a step for each part, half of it off at most.
    scale = np.abs(np.asarray(want)).max()
    rounded = 2.0**-6 if name == "int8 x int8" and spec == ROWS else 2.0**-20
    np.testing.assert_allclose(got, want, rtol=0, atol=rounded * scale)


@pytest.mark.ci
@pytest.mark.fast("tpu-nf4-columns", "tpu-int3-rows", "cuda-nf4-rows", "cuda-int3-columns")
@pytest.mark.parametrize("spec", [COLUMNS, ROWS], ids=["columns", "rows"])
@pytest.mark.parametrize("name", ["nf4", "int3"])
@pytest.mark.parametrize("platform", KERNEL_CALLS)
def test_kernels_take_parts(platform, name, spec):
    """What compilers do not split runs on each device's part."""
    w, x = (jnp.asarray(a, jnp.bfloat16) for a in (normal(1024, 1024), normal(8, 1024, seed=1)))
    small = jc.compress({"w": w}, FORMS[name])
    chip = H100 if platform == "cuda" else None
    mesh = AbstractMesh((2, 4), **AXES, abstract_device=chip)
    fn = split(jc.lift(matmul, on_fallback="error", pallas=True), small["w"], spec, mesh)
    types = jax.eval_shape(lambda *args: args, small, x)
    assert lowered_for(platform, fn, *types).count(KERNEL_CALLS[platform]) == 1


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("spec", [COLUMNS, ROWS], ids=["columns", "rows"])
@pytest.mark.parametrize("c", [jc.quantize("int8"), jc.quantize("int4", 32)], ids=["int8", "int4"])
def test_gradients_of_parts(c, spec):
    """Those of activations, through the sum over devices."""
    w, x = jnp.asarray(normal(512, 256)), jnp.asarray(normal(8, 512, seed=1))
    small = jc.compress({"w": w}, c)
    fn = jc.lift(matmul, on_fallback="error")
    parts = split(fn, small["w"], spec)
    want = jax.grad(lambda x: jnp.sum(fn(small, x) ** 2))(x)
    got = jax.grad(lambda x: jnp.sum(parts(small, x) ** 2))(x)
    np.testing.assert_allclose(got, want, rtol=0, atol=2.0**-20 * np.abs(np.asarray(want)).max())
