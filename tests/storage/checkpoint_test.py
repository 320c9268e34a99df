import collections
import pathlib
import pickle
import subprocess
import sys
import warnings
from contextlib import nullcontext
from typing import NamedTuple

import equinox as eqx
import flax.nnx as nnx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc
from jaxopt_compress.storage import load_shapes
from tests.array_contract import LEAVES

DTYPES = (
    "bool int2 uint2 int4 uint4 int8 uint8 int16 uint16 int32 uint32 bfloat16 float16 float32 "
    "complex64 float4_e2m1fn float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn "
    "float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
).split()
HOST_DTYPES = [*DTYPES, "int64", "uint64", "float64", "complex128", "float6_e2m3fn", "int1"]


class Pair(NamedTuple):
    first: jax.Array
    second: object


def values(dtype, *shape):
    """Every bit pattern that the width has, for dtypes of one byte or less."""
    dtype, count = np.dtype(dtype), int(np.prod(shape))
    if dtype.kind == "b":
        return (np.arange(count) % 3 == 0).reshape(shape)
    if dtype.itemsize > 1 or jnp.issubdtype(dtype, jnp.integer):
        return np.arange(count).reshape(shape).astype(dtype)
    bits = jnp.finfo(dtype).bits
    return (np.arange(count) % 2**bits).astype(np.uint8).view(dtype).reshape(shape)


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert type(a) is type(b)
        if not hasattr(b, "dtype"):
            assert repr(a) == repr(b)
            continue
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def size_on_disk(path):
    return sum(f.stat().st_size for f in pathlib.Path(path).rglob("*") if f.is_file())


def everything():
    rng = np.random.default_rng(0)
    dense = {"w": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)}
    nested = jc.compress(dense, jc.chain(jc.low_rank(rank=4), jc.quantize("int4")))
    return {
        "leaves": {leaf.name: leaf.example().leaf for leaf in LEAVES},
        "nested": (nested, [nested["w"], None], ()),
        "jax": {d: jnp.asarray(values(d, 3, 7)) for d in DTYPES},
        "numpy": {d: values(d, 3, 8) for d in HOST_DTYPES},
        "scalars": [True, -3, 10**40, 0.1, float("-inf"), 1 - 2j, "text", np.float16(2), {}],
        "empty": [np.zeros((0, 3), np.int64), jnp.zeros((2, 0), jnp.int4)],
        "rank0": [np.array(1.5), jnp.array(3, jnp.int4), np.array(2, np.int64)],
        "key": jax.random.key(7),
    }


@pytest.mark.ci
def test_a_fresh_process_gets_equal_leaves_without_a_template(tmp_path):
    tree = everything()
    jc.save(tmp_path / "ckpt", tree)
    script = (
        "import sys, pickle, jax, jaxopt_compress as jc\n"
        "tree = jc.load(sys.argv[1])\n"
        "tree['key'] = jax.random.key_data(tree['key'])\n"
        "pickle.dump(tree, open(sys.argv[2], 'wb'))"
    )
    command = [sys.executable, "-c", script, tmp_path / "ckpt", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out", "rb") as file:
        got = pickle.load(file)
    got["key"] = jax.random.wrap_key_data(got["key"])
    assert_equal(got, tree)


SIZED = [leaf for leaf in LEAVES if leaf.name in ("int4", "int2_unpacked", "int4_2:4", "low_rank")]


@pytest.mark.parametrize("leaf", SIZED, ids=lambda leaf: leaf.name)
def test_files_are_as_large_as_nbytes_says(leaf, tmp_path):
    example = leaf.example((8,)).leaf
    jc.save(tmp_path / "ckpt", [example])
    stored, said = size_on_disk(tmp_path / "ckpt"), jc.nbytes(example)
    arrays = len(jax.tree.leaves(example))
    # The index of the arrays takes up to some kilobytes more in one save than in the next.
    assert said <= stored <= said + 9_000 + 1_000 * arrays


@pytest.mark.parametrize(("bits", "bytes_each"), [("int4", 0.5), ("int2", 0.25), ("int8", 1)])
def test_codes_take_their_true_width(bits, bytes_each, tmp_path):
    w = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(1000, 401)), jnp.float32)}
    small = jc.compress(w, jc.quantize(bits))
    jc.save(tmp_path / "ckpt", small)
    assert jc.nbytes(small) == int(np.ceil(401_000 * bytes_each)) + 4 * 401
    assert jc.nbytes(small) <= size_on_disk(tmp_path / "ckpt") <= jc.nbytes(small) + 11_000


ARRAYS = st.builds(
    lambda dtype, shape, host: (
        values(dtype, *shape) if host else jnp.asarray(values(dtype, *shape))
    ),
    st.sampled_from(DTYPES),
    st.sampled_from([(), (1,), (3,), (8,), (2, 5), (0, 2), (4, 2, 8)]),
    st.booleans(),
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
KEYS = st.text(max_size=5)
TREES = st.recursive(
    ARRAYS | SCALARS | st.sampled_from(LEAVES).map(lambda leaf: leaf.example().leaf),
    lambda t: (
        st.lists(t, max_size=3)
        | st.lists(t, max_size=3).map(tuple)
        | st.dictionaries(KEYS, t, max_size=3)
        | st.dictionaries(st.integers(0, 9), t, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=TREES)
def test_any_tree_comes_back(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("trees") / "ckpt"
    jc.save(path, tree)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(jc.load(path), tree)


def test_shapes_are_read_without_data(tmp_path):
    small = jc.compress({"w": jnp.ones((8, 4))}, jc.quantize("int4"))
    jc.save(tmp_path / "ckpt", small)
    found = load_shapes(tmp_path / "ckpt")["w"]
    assert (found.shape, found.nbytes) == (small["w"].shape, small["w"].nbytes)
    assert isinstance(found.codes, jax.ShapeDtypeStruct)


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


def test_an_existing_path_is_replaced_only_on_request(tmp_path):
    jc.save(tmp_path / "ckpt", {"w": jnp.zeros(3)})
    with pytest.raises(FileExistsError, match="overwrite=True"):
        jc.save(tmp_path / "ckpt", {"w": jnp.ones(3)})
    jc.save(tmp_path / "ckpt", {"w": jnp.ones(3)}, overwrite=True)
    assert_equal(jc.load(tmp_path / "ckpt"), {"w": jnp.ones(3)})


def test_orbax_is_not_imported_with_the_package():
    script = (
        "import sys, jaxopt_compress; "
        "print([m for m in sys.modules if m.split('.')[0] in ('orbax', 'flax', 'tyro')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


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


@pytest.mark.slow
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
