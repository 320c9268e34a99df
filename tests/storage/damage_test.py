"""Damage that is refused when a checkpoint is loaded: flipped bits, torn files, other arrays."""

import contextlib
import shutil

# Else pytest's plugin of hypothesis imports it after the last test, where this has failed at times
# behind the many reads that are refused here: "AST constructor recursion depth mismatch".
import hypothesis  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from tests.array_contract import LEAVES
from tests.storage.trees import assert_equal


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint, what is in it, and its files."""
    leaves = ("int4", "uint3", "rows", "2:4", "low_rank", "nvfp4")
    tree = {
        "leaves": {leaf.name: leaf.example().leaf for leaf in LEAVES if leaf.name in leaves},
        "dense": np.random.default_rng(0).normal(size=(40, 30)),
        "rest": [jax.random.key(3), 0.1, jnp.arange(900, dtype=jnp.bfloat16), "text"],
    }
    path = tmp_path_factory.mktemp("whole") / "ckpt"
    jc.save(path, tree)
    return path, tree, sorted(f for f in path.rglob("*") if f.is_file() and f.stat().st_size)


def is_refused(path, tree):
    """Whether a checkpoint is refused; if not, it has to be what was saved."""
    try:
        found = jc.load(path)
    except jc.CheckpointError as error:
        assert str(path) in str(error)
        return True
    assert_equal(found, tree)
    return False


@contextlib.contextmanager
def replaced(file, content):
    whole = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(whole)


def flipped(content, bit):
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@pytest.mark.parametrize("flips", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_each_flipped_bit_is_refused_or_carries_nothing(flips, whole):
    path, tree, files = whole
    rng = np.random.default_rng(flips)
    sizes = np.array([f.stat().st_size for f in files])
    refused = 0
    for _ in range(flips):
        # Half of them by file, so that small ones have their share.
        weights = sizes if rng.random() < 0.5 else np.ones(len(files))
        file = files[rng.choice(len(files), p=weights / weights.sum())]
        content = file.read_bytes()
        with replaced(file, flipped(content, rng.integers(8 * len(content)))):
            found = is_refused(path, tree)
        assert found or file.name != "checkpoint.jsonl"
        refused += found
    # The others are in copies that orbax makes of small arrays and of its indices.
    assert refused > flips / 3


def test_each_flipped_bit_of_an_array_is_refused_by_its_name(whole):
    path, tree, files = whole
    rng = np.random.default_rng(0)
    for name, array in (("dense", tree["dense"]), ("rest/2", np.asarray(tree["rest"][2]))):
        data = array.tobytes()
        (file,) = (f for f in files if data in f.read_bytes())
        content = file.read_bytes()
        start = 8 * content.index(data)
        for bit in (0, 8 * len(data) - 1, *rng.integers(8 * len(data), size=10)):
            with replaced(file, flipped(content, start + bit)):
                with pytest.raises(jc.CheckpointError, match=rf"data-\w+ .*'{name}': its part"):
                    jc.load(path)


@pytest.mark.parametrize("how", ["zeroed", "truncated", "emptied", "lengthened"])
def test_each_damaged_file_is_refused_or_carries_nothing(how, whole):
    path, tree, files = whole
    refused = set()
    for file in files:
        content = file.read_bytes()
        half = content[: len(content) // 2]
        new = {"zeroed": bytes(len(content)), "truncated": half, "emptied": b""}
        with replaced(file, new.get(how, content + b"\0")):
            if is_refused(path, tree):
                refused.add(file.relative_to(path).parts[-1 if file.parent == path else 1])
    # Of its other files, orbax reads from an offset as many bytes as there were.
    parts = {"_METADATA", "d", "ocdbt.process_0"} if how != "lengthened" else {"_METADATA"}
    assert refused >= {"checkpoint.jsonl", "manifest.ocdbt"} | parts


def test_arrays_of_another_checkpoint_are_refused(whole, tmp_path):
    path, tree, _ = whole
    shutil.copytree(path, tmp_path / "ckpt")
    other = dict(tree, dense=tree["dense"] + 1)
    jc.save(tmp_path / "other", other)
    (own,), (theirs,) = ((tmp_path / p).glob("data-*") for p in ("ckpt", "other"))
    shutil.rmtree(own)
    shutil.copytree(theirs, own)
    with pytest.raises(jc.CheckpointError, match=r"data-\w+ .*'dense': its part .*checksum"):
        jc.load(tmp_path / "ckpt")
    shutil.rmtree(own)
    with pytest.raises(jc.CheckpointError, match="ckpt/data-"):
        jc.load(tmp_path / "ckpt")
    shutil.copy(tmp_path / "other" / "checkpoint.jsonl", tmp_path / "ckpt")
    with pytest.raises(jc.CheckpointError, match="ckpt/data-"):
        jc.load(tmp_path / "ckpt")
