import pathlib

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.storage.interchange.fields import Linear
from jaxopt_compress.storage.interchange.gguf import from_blocks, to_blocks

KNOWN = pathlib.Path(__file__).parents[2] / "known_answers"


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_blocks_are_those_of_llama_cpp(kind):
    known = np.load(KNOWN / "gguf.npz")
    linear = from_blocks(known[f"{kind}/blocks"], kind)
    np.testing.assert_array_equal(linear.scale.astype(np.float32), known[f"{kind}/scale"])
    np.testing.assert_array_equal(
        linear.codes * linear.scale.astype(np.float32), known[f"{kind}/dequantized"]
    )
    np.testing.assert_array_equal(to_blocks(linear), known[f"{kind}/blocks"])


def small(layout, **options):
    w = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    tree = {"int4": {"weight": jnp.asarray(w)}, "int8": {"weight": jnp.asarray(w)}}
    how = {"group_size": 32, "scale_dtype": "float16"} | options
    recipe = {"int4/*": jc.quantize("int4", **how), "int8/*": jc.quantize("int8", **how)}
    dense = {"norm": jnp.arange(5.0), "half": jnp.ones((2, 3), jnp.bfloat16)}
    return jc.compress(tree, recipe, layout=layout) | dense


@pytest.mark.fast("in,out")
@pytest.mark.parametrize("layout", ["out,in", "in,out"])
def test_files_are_read_by_the_package_gguf_and_by_us(layout, tmp_path):
    tree = small(layout)
    jc.save_gguf(tmp_path / "m.gguf", tree, "llama", layout=layout)
    found = jc.load_gguf(tmp_path / "m.gguf")
    theirs = {
        t.name: gguf.dequantize(t.data, t.tensor_type)
        for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors
    }
    assert found.keys() == theirs.keys() == {"int4.weight", "int8.weight", "norm", "half"}
    for name in ("int4", "int8"):
        leaf = found[f"{name}.weight"]
        turn = np.transpose if layout == "in,out" else np.asarray
        np.testing.assert_array_equal(leaf.unpacked(), turn(tree[name]["weight"].unpacked()))
        np.testing.assert_array_equal(leaf.scale, turn(tree[name]["weight"].scale))
        levels = np.asarray(leaf.unpacked()) * np.repeat(np.asarray(leaf.scale, np.float32), 32, 1)
        np.testing.assert_array_equal(theirs[f"{name}.weight"], levels)
    np.testing.assert_array_equal(found["norm"], np.arange(5.0))
    assert found["half"].dtype == jnp.bfloat16 and found["half"].shape == (2, 3)


def test_dense_matrices_are_rounded_by_request(tmp_path):
    known = np.load(KNOWN / "gguf.npz")
    tree = {"a": {"weight": jnp.asarray(known["x"])}}
    jc.save_gguf(tmp_path / "m.gguf", tree, "llama", types={"a/weight": "Q4_1"})
    np.testing.assert_array_equal(
        jc.load_gguf(tmp_path / "m.gguf")["a.weight"], known["Q4_1/dequantized"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 16}, "'int4/weight' of shape .* groups of 32"),
        ({"symmetric": False}, "no zero points"),
        ({"scale_dtype": "float32"}, "scale_dtype='float16'"),
    ],
)
def test_forms_without_a_counterpart_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        jc.save_gguf(tmp_path / "m.gguf", small("out,in", **options), "llama")
    assert not (tmp_path / "m.gguf").exists()


def test_dense_arrays_of_any_shape_come_back(tmp_path):
    """Also what JAX would narrow, as it was, and scalars of bfloat16."""
    tree = {
        "scalar": jnp.float32(3),
        "half": jnp.bfloat16(2),
        "none": np.zeros((0, 3), np.float16),
        "five": np.arange(12, dtype=np.int16).reshape(1, 2, 1, 2, 3),
        "large": np.array([2**40 + 1, -(2**50)]),
        "double": np.array([1 + 2.0**-40]),
        "special": np.array([np.nan, -np.inf, -0.0], jnp.bfloat16),
    }
    jc.save_gguf(tmp_path / "m.gguf", tree, "llama")
    found = jc.load_gguf(tmp_path / "m.gguf")
    for name, want in tree.items():
        assert found[name].shape == want.shape
        a, b = (np.asarray(x).astype(found[name].dtype) for x in (found[name], want))
        assert a.tobytes() == b.tobytes()
    assert found["large"].dtype == np.int64 and found["double"].dtype == np.float64


def test_matrices_without_rows_have_blocks():
    own = Linear(np.zeros((0, 64), np.int8), np.zeros((0, 2), np.float16), None, 4, 32)
    assert from_blocks(to_blocks(own), "Q4_0").codes.shape == (0, 64)


@pytest.mark.parametrize(
    ("x", "types", "message"),
    [
        (np.ones((2, 3), bool), {}, r"'w' of shape \(2, 3\) and bool cannot be written: GGUF has"),
        (np.ones(3, np.uint8), {}, "uint8 cannot be written"),
        (np.ones((2, 40)), {"w": "Q4_1"}, "multiple of the 32 entries"),
        (np.ones((2, 256)), {"w": "Q2_K"}, "'w' .* the package gguf cannot write this type"),
        (np.full((2, 32), np.nan), {"w": "Q8_0"}, "no NaN"),
    ],
)
def test_arrays_without_a_counterpart_are_refused_by_their_path(x, types, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        jc.save_gguf(tmp_path / "m.gguf", {"w": x}, "llama", types=types)
    assert not list(tmp_path.iterdir())


def test_files_are_replaced_on_request_and_others_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"m\.gguf"):
        jc.load_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"no such file, but long enough for a header of numbers")
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        jc.load_gguf(tmp_path / "m.gguf")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        jc.save_gguf(tmp_path / "m.gguf", {"w": jnp.ones(3)}, "llama")
    with pytest.raises(ValueError, match="types has 'v'"):
        jc.save_gguf(tmp_path / "n.gguf", {"w": jnp.ones(3)}, "llama", types={"v": "Q4_1"})
    jc.save_gguf(tmp_path / "m.gguf", {"w": jnp.ones(3)}, "llama", overwrite=True)
    assert jc.load_gguf(tmp_path / "m.gguf")["w"].tolist() == [1, 1, 1]
