import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import stats

import jaxopt_compress as jc
from jaxopt_compress.storage.coding import CODINGS
from jaxopt_compress.storage.folder import sealed, unsealed
from tests.storage.damage_test import flipped, replaced
from tests.storage.trees import assert_equal, everything

NAMES = [name for name in CODINGS if name]


def files(path):
    return sorted(f for f in pathlib.Path(path).rglob("*") if f.is_file() and f.stat().st_size)


def coded_size(path):
    return sum(f.stat().st_size for f in files(path) if f.name.startswith("chunks-"))


@pytest.mark.ci
@pytest.mark.parametrize("coding", NAMES)
def test_every_kind_of_leaf_comes_back(coding, tmp_path):
    tree = everything()
    jc.save(tmp_path / "ckpt", tree, coding=coding)
    assert_equal(jc.load(tmp_path / "ckpt"), tree)
    assert coded_size(tmp_path / "ckpt") == jc.coded_bytes(tree, coding)


@pytest.mark.fast("int4")
@pytest.mark.parametrize("name", ["int3", "int4", "int8", "nf4", "ternary"])
def test_codes_take_their_entropy(name):
    w = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)
    small = jc.compress({"w": jnp.asarray(w)}, jc.quantize(name), layout="in,out")
    counts = np.unique(np.asarray(small["w"].unpacked()).view(np.uint8), return_counts=True)[1]
    entropy = w.size * stats.entropy(counts, base=2) / 8
    scales = small["w"].scale.nbytes
    assert jc.coded_bytes(small) < 1.01 * entropy + 64 + scales + 16


def test_a_coded_checkpoint_replaces_a_plain_one_and_the_other_way_round(tmp_path):
    small = jc.compress({"w": jnp.eye(64)}, jc.quantize("int8"), layout="in,out")
    for coding in ("ans", None, "zstd"):
        jc.save(tmp_path / "ckpt", small, overwrite=True, coding=coding)
        assert_equal(jc.load(tmp_path / "ckpt"), small)
        assert len(list((tmp_path / "ckpt").glob("data-*"))) == 1
        assert jc.coded_bytes(small) < jc.nbytes(small)


def test_an_unknown_coding_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="coding='lzma': one of 'ans'"):
        jc.save(tmp_path / "ckpt", {"w": jnp.ones(3)}, coding="lzma")
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.fast("spec0")
@pytest.mark.parametrize("spec", [P("x"), P("y", "x")])
def test_shards_are_coded_one_by_one_and_read_onto_shardings(spec, tmp_path):
    mesh = jax.make_mesh((4, 2), ("x", "y"), (AxisType.Auto,) * 2)
    dense = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)}
    sharding = NamedSharding(mesh, spec)
    compressed = jc.compress(dense, jc.quantize("int4"), layout="in,out")
    small = jc.shard(compressed, sharding)
    jc.save(tmp_path / "ckpt", small, coding="ans")
    document = unsealed((tmp_path / "ckpt" / "checkpoint.jsonl").read_bytes())
    assert max(map(len, document["chunks"].values())) == 4 * (2 if "y" in spec else 1)
    assert_equal(jc.load(tmp_path / "ckpt"), compressed)
    abstract = {"w": jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding)}
    for like in (small, abstract):
        found = jc.load(tmp_path / "ckpt", like=like)
        assert_equal(found, compressed)
        assert found["w"].codes.sharding.is_equivalent_to(small["w"].codes.sharding, 2)
    # From one device onto many, whose shards are not whole parts.
    jc.save(tmp_path / "single", compressed, coding="ans")
    assert_equal(jc.load(tmp_path / "single", like=abstract), compressed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    rng = np.random.default_rng(0)
    w = {k: jnp.asarray(rng.normal(size=(64, 48)), jnp.float32) for k in ("int4", "sparse", "raw")}
    sparse = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.8))
    recipe = {"int4": jc.quantize("int4"), "sparse": sparse}
    tree = jc.compress(w, recipe, layout="in,out")
    path = tmp_path_factory.mktemp("coded") / "ckpt"
    jc.save(path, tree, coding="ans")
    return path, tree


def test_each_flipped_bit_is_refused_by_the_name_of_its_leaf(saved):
    path, tree = saved
    (file,) = path.glob("data-*/chunks-0")
    content = file.read_bytes()
    bits = np.random.default_rng(0).integers(0, 8 * len(content), 60)
    for bit in (0, 8 * len(content) - 1, *bits):
        with replaced(file, flipped(content, bit)):
            with pytest.raises(jc.CheckpointError, match=r"'(int4|sparse|raw).*its chunk of"):
                jc.load(path)
    assert_equal(jc.load(path), tree)


@pytest.mark.parametrize("coding", ["ans", None])
def test_leaves_that_are_left_out_are_not_read(coding, tmp_path):
    """So what is whole can be had from a damaged file, if its size is right."""
    tree = {"a": np.arange(300), "b": [np.arange(20.0), jax.random.key(0)], "c": {"d": 2}}
    jc.save(tmp_path / "ckpt", tree, coding=coding)
    part = {"a": ..., "b": [tree["b"][0], ...], "c": {"d": ...}}
    assert_equal(jc.load(tmp_path / "ckpt", like=part), part)
    with pytest.raises(ValueError, match="like has no 'a'"):
        jc.load(tmp_path / "ckpt", like={"b": part["b"], "c": part["c"]})
    if coding:
        (file,) = (tmp_path / "ckpt").glob("data-*/chunks-0")
        with replaced(file, flipped(file.read_bytes(), 0)):
            with pytest.raises(jc.CheckpointError, match="'a'"):
                jc.load(tmp_path / "ckpt")
            assert_equal(jc.load(tmp_path / "ckpt", like=part), part)


@pytest.mark.parametrize("how", ["truncated", "emptied", "lengthened", "removed"])
def test_files_of_another_size_are_refused(how, saved):
    path, _ = saved
    (file,) = path.glob("data-*/chunks-0")
    content = file.read_bytes()
    new = {"truncated": content[:-3], "emptied": b"", "lengthened": content + b"\0"}
    with replaced(file, new.get(how, content)):
        if how == "removed":
            file.unlink()
        with pytest.raises(jc.CheckpointError, match=r"chunks-0 has (\d+|None) bytes, not"):
            jc.load(path)


def set_chunk(index, value):
    def change(document):
        document["chunks"]["0"][0][index] = value

    return change


def drop(name):
    return lambda document: document.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_chunk(1, 5), "a chunk from 5 on in file 0"),
        (set_chunk(2, 0), "of another form"),
        (set_chunk(3, -1), "of another form"),
        (lambda document: document["chunks"]["0"].append([0, 0, 1, 0]), "file 0"),
        (lambda document: document["chunks"].pop("0"), "of other arrays"),
        (lambda document: document.update(chunks=[]), "of other arrays"),
        (drop("chunks"), "a document of"),
        (lambda document: document.update(version=6), "reads versions 4 and 5"),
        (lambda document: document.update(version=4), "a document of"),
    ],
)
def test_descriptions_of_chunks_that_cannot_be_right_are_refused(change, message, saved):
    path, _ = saved
    document = unsealed((path / "checkpoint.jsonl").read_bytes())
    change(document)
    with replaced(path / "checkpoint.jsonl", sealed(document)):
        with pytest.raises(jc.CheckpointError, match=message):
            jc.load(path)
