"""Safetensors: the same paths as those of the command, and nothing lost on the way."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxopt_compress as jc
from jaxopt_compress.storage import open_checkpoint

W = np.arange(8, dtype=np.float32).reshape(4, 2)
TENSORS = {
    "model.0.weight": W,
    "model.0.bias": np.ones(4, jnp.bfloat16),
    "head.weight": 2 * W,
    "head.steps": np.array([2**40]),
}


def write(folder, index=False):
    folder.mkdir()
    files = {}
    for i, (key, value) in enumerate(TENSORS.items()):
        files[key] = f"part{i}.safetensors"
        save_file({key: value}, folder / files[key])
    if index:
        text = json.dumps({"metadata": {}, "weight_map": files})
        (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("kind", ["file", "folder", "index", "folder of an index"])
def test_tensors_come_back_under_the_paths_of_the_command(kind, tmp_path):
    path = tmp_path / "m"
    if kind == "file":
        path = tmp_path / "m.safetensors"
        save_file(TENSORS, path)
    else:
        write(path, index="index" in kind)
        if "index" in kind:
            # What the index does not name is another form of the same weights.
            save_file(TENSORS, path / "consolidated.safetensors")
        path = path / "model.safetensors.index.json" if kind == "index" else path
    params = jc.load_safetensors(path)
    found = {k: x for k, x in jax.tree_util.tree_leaves_with_path(params)}
    assert len(found) == len(TENSORS)
    for key, value in TENSORS.items():
        leaf = params
        for name in key.split("."):
            leaf = leaf[name]
        assert leaf.dtype == value.dtype
        np.testing.assert_array_equal(leaf, value)
        np.testing.assert_array_equal(open_checkpoint(path).read(key.replace(".", "/")), value)
    assert isinstance(params["head"]["weight"], jax.Array)
    assert isinstance(params["head"]["steps"], np.ndarray)  # JAX would make it int32.


def test_two_tensors_of_one_path_are_refused(tmp_path):
    save_file({"a.b": W, "a/b": 2 * W}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"'a.b' in m.safe.* 'a/b' in m.safe.* the path 'a/b'"):
        jc.load_safetensors(tmp_path / "m.safetensors")
    (tmp_path / "shards").mkdir()
    save_file({"x": W}, tmp_path / "shards" / "1.safetensors")
    save_file({"x": 2 * W}, tmp_path / "shards" / "2.safetensors")
    with pytest.raises(ValueError, match=r"'x' in 1.safetensors and 'x' in 2.safetensors"):
        open_checkpoint(tmp_path / "shards")


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        jc.load_safetensors(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="no file or folder of safetensors"):
        jc.load_safetensors(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "gone.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"names gone.safetensors, which is not beside it"):
        jc.load_safetensors(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="it has no weight_map"):
        jc.load_safetensors(index)
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"several checkpoints, model.* other.*: give the path"):
        jc.load_safetensors(tmp_path)
