"""Checkpoints without a template: equal leaves in other processes, and sizes of files."""

import pathlib
import pickle
import subprocess
import sys
import warnings

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import jaxopt_compress as jc
from jaxopt_compress.storage import load_shapes
from tests.array_contract import LEAVES
from tests.storage.trees import DTYPES, assert_equal, everything, values


def size_on_disk(path):
    return sum(f.stat().st_size for f in pathlib.Path(path).rglob("*") if f.is_file())


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
