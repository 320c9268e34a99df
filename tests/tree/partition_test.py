"""Splitting, joining, placing and counting trees."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxopt_compress.arrays import QuantizedArray, is_compressed
from jaxopt_compress.arrays.sparse import sparse_rows
from jaxopt_compress.tree import combine, nbytes, partition, resident_bytes, shard

SPEC = PartitionSpec("x")


def quantized(rows=8, columns=4, dtype=jnp.int8, bits=8):
    codes = jnp.arange(rows * columns).reshape(rows, columns).astype(dtype)
    scale = jnp.full((1, columns), 0.5)
    return QuantizedArray(codes, scale, None, jnp.dtype("float32"), f"int{bits}", -2)


def tree():
    return {
        "w": quantized(),
        "b": jnp.ones(8, jnp.bfloat16),
        "step": jnp.array(3),
        "key": jax.random.key(0),
        "none": None,
        "tuple": (np.ones(2, np.float32), "name", 2.5),
    }


def mesh():
    return jax.make_mesh((8,), ("x",))


def test_halves():
    floats, rest = partition(tree())
    assert floats["w"].codes is None and rest["w"].scale is None
    assert sorted(x.dtype.name for x in jax.tree.leaves(floats)) == [
        "bfloat16",
        "float32",
        "float32",
    ]
    assert rest["tuple"] == (None, "name", 2.5)
    back = combine(floats, rest)
    assert jax.tree.structure(back) == jax.tree.structure(tree())
    assert all(
        a is b or (a == b).all() for a, b in zip(*map(jax.tree.leaves, (back, tree())), strict=True)
    )


class Module(eqx.Module):
    weight: jax.Array
    count: jax.Array


@pytest.mark.parametrize(
    "model",
    [
        nnx.state(nnx.BatchNorm(2, rngs=nnx.Rngs(0))),
        Module(jnp.ones(2), jnp.zeros(1, int)),
        (),
        None,
    ],
    ids=["nnx", "equinox", "empty", "none"],
)
def test_halves_of_containers(model):
    floats, rest = partition(model)
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(floats))
    back = combine(floats, rest)
    assert jax.tree.structure(back) == jax.tree.structure(model)


def test_codes_are_safe_from_optimizers():
    params = {"w": quantized(), "b": jnp.ones(4)}
    floats, rest = partition(params)
    tx = optax.adamw(0.1)

    @jax.jit
    def step(floats, state):
        def loss(floats):
            whole = combine(floats, rest)
            return jnp.sum((jnp.ones(8) @ whole["w"].materialize() + whole["b"]) ** 2)

        updates, state = tx.update(jax.grad(loss)(floats), state, floats)
        return optax.apply_updates(floats, updates), state

    moved, _ = step(floats, tx.init(floats))
    assert (moved["w"].scale != floats["w"].scale).all() and (moved["b"] != floats["b"]).all()
    np.testing.assert_array_equal(combine(moved, rest)["w"].codes, params["w"].codes)


def test_bytes_by_hand():
    rows = sparse_rows(jnp.ones(5), jnp.array([True, False, True, False, True]), 1)
    # An odd number of codes of half a byte, a word for five bits, and plain arrays.
    odd = quantized(3, 1, jnp.int4, 4)
    parts = {"odd": odd, "rows": rows, "flag": jnp.ones(3, bool), "half": jnp.ones(3, jnp.float16)}
    assert {k: nbytes(v) for k, v in parts.items()} == {
        "odd": 2 + 4,
        "rows": 12 + 1,
        "flag": 3,
        "half": 6,
    }
    assert resident_bytes(parts) == (3 + 4) + 13 + 3 + 6
    assert nbytes([parts, None, "text"]) == 28
    shapes = jax.eval_shape(lambda: parts)
    assert (nbytes(shapes), resident_bytes(shapes)) == (28, 29)
    assert sum(map(nbytes, partition(parts))) == 28
    assert nbytes(jax.random.key(0)) == jax.random.key_data(jax.random.key(0)).nbytes


def test_shard_by_one_sharding_and_by_a_tree():
    params = {"w": quantized(), "v": [jnp.ones((16, 2)), None]}
    one = NamedSharding(mesh(), SPEC)
    placed = shard(params, one)
    assert placed["w"].codes.sharding.is_equivalent_to(one, 2)
    assert placed["w"].scale.sharding.is_fully_replicated
    assert placed["v"][0].sharding.is_equivalent_to(one, 2) and placed["v"][1] is None
    copied = NamedSharding(mesh(), PartitionSpec())
    mixed = shard(params, {"w": copied, "v": [one, None]})
    assert mixed["w"].codes.sharding.is_fully_replicated
    assert mixed["v"][0].sharding.is_equivalent_to(one, 2)
    lone = shard(params, SingleDeviceSharding(jax.devices()[1]))
    assert all(x.devices() == {jax.devices()[1]} for x in jax.tree.leaves(lone))
    for x in (placed, mixed, lone):
        assert jax.tree.structure(x) == jax.tree.structure(params) and is_compressed(x["w"])
        np.testing.assert_array_equal(x["w"].materialize(), params["w"].materialize())


def test_shard_errors_name_the_path():
    with pytest.raises(ValueError, match=r"cannot place 'a/0' of shape \(6, 4\)"):
        shard({"a": [quantized(6)]}, NamedSharding(mesh(), SPEC))
    with pytest.raises(ValueError, match="3 entries for an array of rank 2"):
        shard({"a": quantized()}, NamedSharding(mesh(), PartitionSpec(None, None, "x")))


def test_shapes_are_placed_without_devices():
    abstract = AbstractMesh((256,), ("x",))
    leaf = jax.eval_shape(lambda: quantized(rows=8192, columns=1024))
    placed = shard({"w": leaf}, NamedSharding(abstract, PartitionSpec("x")))["w"]
    assert placed.codes.sharding.shard_shape(placed.codes.shape) == (32, 1024)
    # The scale has size 1 along the axis that is split.
    assert placed.scale.sharding.spec == PartitionSpec(None, None)
    with pytest.raises(ValueError, match="cannot place 'w'"):
        shard({"w": jax.eval_shape(quantized)}, NamedSharding(abstract, PartitionSpec("x")))
