"""Parts of every compressed array on several devices, and which axes cannot be split."""

import jax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxopt_compress.tree import shard
from tests.array_contract import STACK
from tests.arrays.cases import assert_parts, each_leaf, made, materialize

both_meshes = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


def is_spec(x):
    return isinstance(x, PartitionSpec)


def spec_of(ndim, axis):
    """Splits one negative axis."""
    return PartitionSpec(*("x" if i - ndim == axis else None for i in range(ndim)))


def mesh_of(kind):
    return jax.make_mesh((STACK,), ("x",), axis_types=(kind,))


@pytest.mark.fast(
    "int8-AxisType.Auto",
    "int8_qkv-AxisType.Explicit",
    "int4_grouped_asymmetric-AxisType.Explicit",
    "int2-AxisType.Auto",
    "float8_tiles-AxisType.Explicit",
    "nvfp4-AxisType.Auto",
    "rows-AxisType.Explicit",
    "2:4-AxisType.Auto",
    "low_rank-AxisType.Explicit",
    "quantized_factors-AxisType.Auto",
)
@both_meshes
@each_leaf
def test_shards(case, kind):
    """Parts by `specs` are the parts of the dense array, along every axis that can be split."""
    mesh = mesh_of(kind)
    for stack, axes in (((), case.splits), ((STACK,), (-1 - made(case)[2].ndim,))):
        leaf, _, dense = made(case, stack)
        for axis in axes:
            spec = spec_of(dense.ndim, axis)
            # From the host: to cut what is on a device compiles a program.
            placed = shard({"w": jax.device_get(leaf)}, NamedSharding(mesh, spec))["w"]
            specs = leaf.specs(spec)
            for x, s in zip(
                jax.tree.leaves(placed), jax.tree.leaves(specs, is_leaf=is_spec), strict=True
            ):
                assert x.sharding.is_equivalent_to(NamedSharding(mesh, s), x.ndim)
            parts = jax.shard_map(materialize, mesh=mesh, in_specs=(specs,), out_specs=spec)
            if kind == AxisType.Auto or stack:
                assert_parts(case, jax.jit(parts)(placed), dense)
            if kind == AxisType.Explicit or stack:
                whole = jax.jit(materialize)(placed)
                assert_parts(case, whole, dense)
                assert whole.sharding.is_equivalent_to(NamedSharding(mesh, spec), dense.ndim)


@each_leaf
def test_refused_shards(case):
    leaf, _, dense = made(case)
    mesh = mesh_of(AxisType.Auto)
    for axis in case.whole:
        with pytest.raises(ValueError, match="cannot be split by"):
            leaf.specs(spec_of(dense.ndim, axis))
        with pytest.raises(ValueError, match=r"'layer/w' of shape .* cannot be split by"):
            shard({"layer": {"w": leaf}}, NamedSharding(mesh, spec_of(dense.ndim, axis)))
    with pytest.raises(ValueError, match=f"entries for an array of rank {dense.ndim}"):
        leaf.specs(PartitionSpec(*[None] * (dense.ndim + 1)))
