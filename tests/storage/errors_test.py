import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.storage.folder import sealed, unsealed


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (object(), r"cannot save 'a/0', a object: .*replace it by None"),
        (np.array(["x"]), "no form for the dtype <U1"),
        (np.zeros(2, np.longdouble), "no form for the dtype float128"),
        ({1.5: 1}, r"cannot save the key 1.5 of 'a/0'"),
        ({1: 1, "1": 2}, "keys are of different types"),
    ],
)
def test_what_cannot_be_saved_is_named(leaf, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        jc.save(tmp_path / "ckpt", {"a": [leaf]})
    assert not (tmp_path / "ckpt").exists()


def test_saving_inside_of_jit_is_refused(tmp_path):
    with pytest.raises(TypeError, match="inside of jit"):
        jax.jit(lambda x: jc.save(tmp_path / "ckpt", {"w": x}))(1.0)


def test_paths_that_are_no_checkpoint_are_named(tmp_path):
    import orbax.checkpoint as ocp

    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*missing"):
        jc.load(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no checkpoint of jaxopt_compress"):
        jc.load(tmp_path / "empty")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="a checkpoint of another program"):
        jc.load(tmp_path / "plain")


def edit(path, change):
    """Changes the document, and gives it the checksum that belongs to that."""
    file = path / "checkpoint.jsonl"
    document = unsealed(file.read_bytes())
    change(document)
    file.write_bytes(sealed(document))


def at(*place, **new):
    """A change of one node: ``at("q", "fields", "codes", array=None)``."""

    def change(document):
        name, *rest = place
        node = dict(document["tree"]["dict"])[name]
        functools.reduce(operator.getitem, rest, node).update(new)

    return change


def without(*place):
    def change(document):
        name, *rest, last = place
        node = dict(document["tree"]["dict"])[name]
        del functools.reduce(operator.getitem, rest, node)[last]

    return change


EMPTY = {"array": None, "shape": [0], "dtype": "float32", "kind": "jax"}
CHANGES = [
    (lambda d: d.update(version=3), "version 3 .* from before it was settled"),
    (lambda d: d.update(version=99), "version 99 .* reads versions 4 and 5: install a newer"),
    (lambda d: d.update(version=True), "damaged: version True"),
    (
        lambda d: d.update(format="other"),
        "is no checkpoint of jaxopt_compress.save: another format",
    ),
    (lambda d: d.update(more=1), "a document of"),
    (lambda d: d.update(data="../other"), "data in '../other'"),
    (lambda d: d.update(data=None), "data in None"),
    (lambda d: d.update(tree={"set": []}), r"unknown kind of leaf.*'set'"),
    (lambda d: d.update(tree={}), "unknown kind of leaf"),
    (lambda d: d.update(tree=3), "3 describes nothing"),
    (lambda d: d.update(tree={"dict": [["a"]]}), "pairs of keys and nodes"),
    (lambda d: d.update(tree={"list": {}}), "unknown kind of leaf"),
    (lambda d: d.update(tree={"int": "3"}), "the int '3'"),
    (lambda d: d.update(tree={"float": "0.10"}), "the float '0.10'"),
    (lambda d: d.update(tree={"str": "x"}), "no leaf has the array"),
    (lambda d: d["tree"]["dict"].append(d["tree"]["dict"][1]), "the key 'd' twice"),
    (lambda d: d["checksums"].pop("0"), "'q/codes': array '0' is unknown"),
    (lambda d: d["checksums"].update({"0": []}), "'q/codes': checksums"),
    (lambda d: d["checksums"]["1"][0][1].__setitem__(0, 1), "'q/scale': checksums"),
    (lambda d: d["checksums"]["1"][0].__setitem__(2, 2**32), "'q/scale': checksums"),
    (lambda d: d["checksums"]["1"][0].__setitem__(2, 1), "'q/scale': its part .* by its checksum"),
    (at("d", shape=[10**12]), "'d': checksums"),
    (at("d", shape=[10**30]), "'d': the shape"),
    (at("d", shape=[-6]), "'d': the shape"),
    (at("d", shape=[6.0]), "'d': the shape"),
    (at("d", shape=[True] * 6), "'d': the shape"),
    (at("d", dtype="int32"), r"'d': array 2 is float32\[6\], not int32\[6\]"),
    (at("d", dtype="f4"), "'d': unknown dtype 'f4'"),
    (at("d", dtype=["float32"]), "'d': unknown dtype"),
    (at("d", dtype="object"), "'d': unknown dtype"),
    (at("d", kind="list"), "'d': unknown kind of array"),
    (at("d", kind="scalar"), "'d': a scalar of shape"),
    (at("d", bits=4), "'d': 4 bits of float32"),
    (at("d", axis=-1), "'d': axis -1 without bits"),
    (at("d", impl="threefry2x32"), "'d': jax by 'threefry2x32'"),
    (at("d", more=1), r"'d': an array has no \['more'\]"),
    (at("d", array="1"), "'d': array '1' is that of another leaf, too"),
    (at("d", array="99"), "'d': array '99' is unknown"),
    (at("d", array=["1"]), "'d': array"),
    (at("e", shape=[7]), r"'e': the array None of shape \[7\]"),
    (at("k", impl="other"), "'k': a random key by 'other'"),
    (at("k", dtype="int32"), "'k': a random key"),
    (at("q", leaf="Other"), "'q': unknown compressed array 'Other'"),
    (at("q", "static", dtype="f7"), "'q': unknown dtype 'f7'"),
    (at("q", "static", dtype="int8"), "'q': format 'int4', of int8"),
    (at("q", "static", group_size=3), "'q': .* does not fit"),
    (at("q", "static", group_size=0), "'q': group_size=0"),
    (at("q", "static", group_size="4"), "'q': group_size='4'"),
    (at("q", "static", block=3), "'q': 4 bits in blocks of 3"),
    (at("q", "static", axis=1), "'q': axis 1 of an array of rank 2"),
    (at("q", "static", axis=None), "'q': axis None of an array of rank 2"),
    (at("q", "static", tile=[-1]), "'q': "),
    (at("q", "static", tile={"a": 1}), "'q': tile is"),
    (at("q", "static", format="int8"), "'q': int4 codes of int8"),
    (at("q", "static", format="evil"), "'q': unknown number format 'evil'"),
    (at("q", "static", format=["int4"]), "'q': format"),
    (at("q", "static", new=3), r"'q': QuantizedArray has no \['new'\]"),
    (at("q", "fields", new=None), r"'q': QuantizedArray has no \['new'\]"),
    (at("q", "fields", scale=None), "'q': "),
    (at("q", "fields", scale={"int": 3}), "'q': the field scale is no array"),
    (at("q", "fields", "codes", array=None), "'q/codes': the array None"),
    (at("q", "fields", "codes", bits=5), "'q/codes': 5 bits of int4"),
    (at("q", "fields", "codes", bits=0), "'q/codes': bits 0"),
    (at("q", "fields", "codes", axis=-3), "'q/codes': 4 bits along axis -3"),
    (at("q", "fields", "codes", dtype="int8"), "'q': int8 codes of int4"),
    (without("q", "fields", "zero"), r"'q': QuantizedArray without its \['zero'\]"),
    (without("q", "static", "tile"), r"'q': QuantizedArray without its \['tile'\]"),
    (without("q", "static"), "'q': a leaf with"),
    (without("q", "fields", "codes", "kind"), r"'q/codes': an array without its \['kind'\]"),
    (without("q", "fields", "codes", "bits"), "'q/codes': int4 without bits"),
    (at("i", "static", format="evil"), "'i': unknown number format 'evil'"),
    (at("i", "static", residuals=3), r"'i': InputQuantizedArray has no \['residuals'\]"),
    (
        at("i", "fields", offset={"array": None, "shape": [0], "dtype": "float32", "kind": "jax"}),
        "'i'",
    ),
    (at("s", "static", core=[3]), "'s': .* does not fit"),
    (at("s", "static", core=[]), "'s': the axes"),
    (at("s", "static", pattern=[2, 4]), "'s': axis None"),
    (at("l", "static", out_ndim=0), "'l': out_ndim=0"),
    (at("l", "static", out_ndim=2), "'l': the factors"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    w = {"w": jnp.arange(32.0).reshape(8, 4)}
    recipes = {
        "q": jc.quantize("int4", group_size=4),
        "i": jc.quantize("int8", activations="int8"),
        "s": jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)),
        "l": jc.low_rank(rank=2),
    }
    leaves = {k: jc.compress(w, c)["w"] for k, c in recipes.items()}
    plain = {"d": jnp.arange(6.0), "e": jnp.zeros((0, 3)), "k": jax.random.key(0)}
    path = tmp_path_factory.mktemp("saved") / "ckpt"
    jc.save(path, {"q": leaves.pop("q")} | plain | leaves)
    return path


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_descriptions_that_cannot_be_right_are_refused(change, message, saved):
    whole = (saved / "checkpoint.jsonl").read_bytes()
    try:
        edit(saved, change)
        with pytest.raises(jc.CheckpointError, match=message) as error:
            jc.load(saved)
        assert str(saved) in str(error.value)
    finally:
        (saved / "checkpoint.jsonl").write_bytes(whole)


def test_a_leaf_that_could_not_be_loaded_is_not_saved(tmp_path):
    small = jc.compress({"w": jnp.ones((8, 4))}, jc.quantize("int4"))
    learned, _ = jc.partition(small)
    with pytest.raises(ValueError, match="cannot save 'w', which could not be loaded"):
        jc.save(tmp_path / "ckpt", learned)
    with pytest.raises(ValueError, match="float32 codes of int4, which are int4"):
        jc.save(tmp_path / "ckpt", jax.tree.map(jnp.float32, small))
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize(
    "victim", ["checkpoint.jsonl", "data-*/manifest.ocdbt", "data-*/_METADATA"]
)
@pytest.mark.parametrize("how", ["truncated", "removed"])
def test_damaged_files_are_reported(victim, how, tmp_path):
    jc.save(tmp_path / "ckpt", {"w": jnp.arange(1000.0)})
    (file,) = (tmp_path / "ckpt").glob(victim)
    if how == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:7])
    with pytest.raises(jc.CheckpointError, match="ckpt"):
        jc.load(tmp_path / "ckpt")


def test_the_document_of_these_tests_is_whole(saved):
    assert set(jc.load(saved)) == set("qdekisl")
