"""Checkpoints that are loaded like a template: containers, shardings, keys and functions."""

import collections
from contextlib import nullcontext
from typing import NamedTuple

import equinox as eqx
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc
from tests.storage.trees import assert_equal


class Pair(NamedTuple):
    first: jax.Array
    second: object


def test_other_containers_come_back_as_dicts_with_a_warning(tmp_path):
    tree = [Pair(jnp.ones(2), 3), collections.OrderedDict(b=jnp.ones(1), a=None)]
    jc.save(tmp_path / "ckpt", tree)
    with pytest.warns(
        UserWarning, match=r"OrderedDict, .*Pair in .* come back as dicts; pass like="
    ):
        found = jc.load(tmp_path / "ckpt")
    assert_equal(found, [{"first": jnp.ones(2), "second": 3}, {"b": jnp.ones(1), "a": None}])
    assert_equal(jc.load(tmp_path / "ckpt", like=tree), tree)


@pytest.mark.parametrize("kind", ["nnx", "equinox", "frozen"])
def test_like_restores_into_any_container(kind, tmp_path):
    if kind == "nnx":
        tree = nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    elif kind == "equinox":
        tree = eqx.filter(eqx.nn.MLP(8, 4, 6, 1, key=jax.random.key(0)), eqx.is_array)
    else:
        from flax.core import freeze

        tree = freeze({"params": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}})
    small = jc.compress(tree, jc.quantize("int8"))
    jc.save(tmp_path / "ckpt", small)
    assert_equal(jc.load(tmp_path / "ckpt", like=small), small)
    # The dense tree says as much: paths, shapes and dtypes.
    assert_equal(jc.load(tmp_path / "ckpt", like=tree), small)
    if kind == "nnx":
        with pytest.warns(UserWarning, match="State"):
            assert set(jc.load(tmp_path / "ckpt")) == {"kernel", "bias"}


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jnp.ones((8, 4)), "c": 1}, "the checkpoint has no 'c'; it has w"),
        ({}, "like has no 'w'"),
        ({"w": jnp.ones((4, 8))}, r"'w' is float32\[8, 4\] in the checkpoint and float32\[4, 8\]"),
        ({"w": jnp.ones((8, 4), jnp.bfloat16)}, "'w' is float32"),
    ],
)
def test_like_must_fit(like, message, tmp_path):
    jc.save(tmp_path / "ckpt", {"w": jnp.ones((8, 4))})
    with pytest.raises(ValueError, match=message):
        jc.load(tmp_path / "ckpt", like=like)


@pytest.mark.ci
@pytest.mark.fast("AxisType.Auto-spec0-shape0", "AxisType.Explicit-spec2-shape2")
@pytest.mark.parametrize(
    ("axis_type", "spec", "shape"),
    [
        (AxisType.Auto, P("x"), (128, 64)),
        (AxisType.Explicit, P(None, "x"), (128, 64)),
        # Neither shards nor their last axes hold whole words.
        (AxisType.Explicit, P("y", "x"), (20, 12)),
        (AxisType.Auto, P(), (16, 24)),
    ],
)
def test_sharded_trees_keep_their_shards(axis_type, spec, shape, tmp_path):
    mesh = jax.make_mesh((4, 2), ("x", "y"), (axis_type,) * 2)
    rng = np.random.default_rng(0)
    dense = {
        k: jnp.asarray(rng.normal(size=shape), jnp.float32) for k in ("int4", "int8", "2:4", "raw")
    }
    recipe = {
        "int4": jc.quantize("int4"),
        "int8": jc.quantize("int8"),
        "2:4": jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), "2:4"),
    }
    sharding = NamedSharding(mesh, spec)
    compressed = jc.compress(dense, recipe) | {"f8": dense["raw"].astype("float8_e5m2")}
    try:
        small = jc.shard(compressed, sharding)
    except ValueError:
        # Masks of few rows cannot be split.
        compressed.pop("2:4")
        small = jc.shard(compressed, sharding)
    jc.save(tmp_path / "ckpt", small)
    assert_equal(jc.load(tmp_path / "ckpt"), compressed)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    abstract = {k: place(v) for k, v in small.items()}
    for like in (small, abstract):
        found = jc.load(tmp_path / "ckpt", like=like)
        assert_equal(found, compressed)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(small), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    # What was saved from one device is restored onto many, too.
    jc.save(tmp_path / "single", compressed)
    assert_equal(jc.load(tmp_path / "single", like=abstract), compressed)


def test_random_keys_come_back_by_a_template(tmp_path):
    params = {"w": jnp.ones((4, 4))}
    c = jc.quantize("int8", key=jax.random.key(3))
    tree = {"state": c.init(params), "many": jax.random.split(jax.random.key(1), 3)}
    jc.save(tmp_path / "ckpt", tree)
    for like in (tree, jax.eval_shape(lambda x: x, tree)):
        assert_equal(jc.load(tmp_path / "ckpt", like=like), tree)
    other = {**tree, "many": jax.random.key(1)}
    with pytest.raises(ValueError, match=r"'many' is uint32\[3, 2\] in the checkpoint"):
        jc.load(tmp_path / "ckpt", like=other)


@pytest.mark.ci
@pytest.mark.fast("w8a8", "sparse")
@pytest.mark.parametrize(
    "compression",
    [
        jc.quantize("int8"),
        jc.quantize("int8", activations="int8"),
        jc.quantize("int3"),
        jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)),
        jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), pattern="2:4"),
        jc.low_rank(rank=1),
    ],
    ids=["int8", "w8a8", "int3", "sparse", "2:4", "low_rank"],
)
def test_a_whole_module_returns_with_its_functions(compression, tmp_path):
    """Of functions the file holds the names; the module in `like` has them."""
    module = eqx.nn.MLP(4, 4, 8, 2, key=jax.random.key(0))
    small = jc.compress(module, compression, layout="out,in")
    jc.save(tmp_path / "module", small)
    back = jc.load(tmp_path / "module", like=module)
    assert back.activation is module.activation
    call = lambda m: jc.lift(lambda m, x: jax.vmap(m)(x))(m, jnp.ones((2, 4)))
    np.testing.assert_array_equal(call(back), call(small))
    arrays, static = eqx.partition(module, eqx.is_array)
    again = eqx.combine(static, jc.compress(arrays, compression, layout="out,in"))
    np.testing.assert_array_equal(call(again), call(small))
    with pytest.raises(ValueError, match=r"only the name of 'activation'.*pass like="):
        jc.load(tmp_path / "module")


@pytest.mark.fast("int4 g8", "int3")
@pytest.mark.filterwarnings("ignore::jaxopt_compress.AssumedLayout")
@pytest.mark.parametrize("name", ["int8", "int4 g8", "int3", "sparse", "2:4", "low rank", "nvfp4"])
def test_leaves_return_onto_the_shardings_of_dense_parameters(name, tmp_path):
    mesh = jax.make_mesh((8,), ("x",))
    split = NamedSharding(mesh, P("x"))
    params = {"w": jax.device_put(jax.random.normal(jax.random.key(0), (64, 16)), split)}
    half, score = jc.schedules.constant(0.5), jc.scores.magnitude()
    c = {
        "int8": jc.quantize("int8"),
        "int4 g8": jc.quantize("int4", group_size=8),
        "int3": jc.quantize("int3"),
        "sparse": jc.prune(score, half),
        "2:4": jc.prune(score, half, pattern="2:4"),
        "low rank": jc.low_rank(rank=2),
        "nvfp4": jc.quantize("nvfp4"),
    }[name]
    small = jc.compress(params, c)
    jc.save(tmp_path / "ckpt", small)
    whole = name in ("int3", "sparse", "nvfp4")
    expected = pytest.warns(UserWarning, match="'w' lies whole") if whole else nullcontext()
    with expected:
        back = jc.load(tmp_path / "ckpt", like=params)
    jax.tree.map(np.testing.assert_array_equal, back, small)
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(back)) == (not whole)
