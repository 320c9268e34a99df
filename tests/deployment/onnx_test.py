"""Functions as files of ONNX, run by onnxruntime."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxopt_compress as jc
from tests.quantization.cases import normal

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def conv(x, w, **given):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, padding="SAME", dimension_numbers=dims, **given)


def cnn(params, images):
    """Strides, dilations, groups, both poolings, a norm and a softmax."""
    x = images.astype(jnp.float32) / 255
    x = jax.nn.relu(conv(x, params["stem"], window_strides=(2, 1)) + params["bias"])
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = conv(x, params["depth"], window_strides=(1, 1), feature_group_count=8, rhs_dilation=(2, 2))
    x = jax.nn.silu(x) * lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-3)
    x = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    x = x.reshape(x.shape[0], -1) @ params["head"]
    return {"logits": x, "label": jnp.argmax(x, -1), "p": jax.nn.softmax(x)}


def attention(params, x):
    """Products of stacks of matrices, kernels of three axes, gelu."""
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, params[name]) for name in ("q", "k", "v"))
    scores = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k), axis=-1)
    x = x + jnp.einsum("bhts,bshk,hkd->btd", scores, v, params["out"])
    return jax.nn.gelu(x @ params["up"].T) + jnp.ones((x.shape[0], 1, 1))


def small_of(shapes, fn, x, recipe):
    params = {
        k: jnp.asarray(normal(*shape, seed=i)) / np.sqrt(np.prod(shape[:-1]))
        for i, (k, shape) in enumerate(shapes.items())
    }
    return jc.compress(params, recipe, uses=jc.uses(fn, params, x))


def check(fn, small, args, path, symbolic):
    jc.export_onnx(path, fn, small, *symbolic)
    # By default this runtime rounds what meets few-bit weights of a product to int8 itself.
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for given in args:
        got = session.run(None, {f"input_{i}": np.asarray(x) for i, x in enumerate(given)})
        want = jax.tree.leaves(jax.jit(fn)(jc.materialize(small), *given))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(np.abs(b).max(), 1))


CNN = {"stem": (3, 3, 2, 8), "bias": (8,), "depth": (3, 3, 1, 8), "head": (4 * 4 * 8, 10)}


def images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 16, 2), np.uint8)


@pytest.fixture(scope="module")
def small_cnn():
    return small_of(CNN, cnn, images(1), jc.quantize("int8"))


@pytest.mark.ci
def test_a_cnn_of_int8_weights(small_cnn, tmp_path):
    path = str(tmp_path / "cnn.onnx")
    shape = jax.export.symbolic_shape("batch, 32, 16, 2")
    check(
        cnn, small_cnn, [(images(1),), (images(5),)], path, [jax.ShapeDtypeStruct(shape, "uint8")]
    )
    stored = {x.name: x for x in onnx.load(path).graph.initializer}
    for name in ("stem", "depth", "head"):
        assert stored[f"{name}/codes"].data_type == onnx.TensorProto.INT8
        codes = onnx.numpy_helper.to_array(stored[f"{name}/codes"])
        np.testing.assert_array_equal(codes, small_cnn[name].codes)
    # No weight is there a second time as floats.
    assert not [x for x in stored.values() if x.data_type == 1 and np.prod(x.dims) > 1000]


@pytest.mark.ci
def test_attention_of_int4_weights_in_groups(tmp_path):
    shapes = dict.fromkeys("qkv", (32, 2, 16)) | {"out": (2, 16, 32), "up": (64, 32)}
    x = normal(3, 7, 32)
    recipe = {"out": jc.quantize("int8"), "**": jc.quantize("int4", group_size=16)}
    small = small_of(shapes, attention, x, recipe)
    symbol = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 7, 32"), "float32")
    check(attention, small, [(x,), (x[:1],)], str(tmp_path / "attention.onnx"), [symbol])


@pytest.mark.ci
def test_a_process_that_has_only_onnxruntime(small_cnn, tmp_path):
    path = tmp_path / "cnn.onnx"
    jc.export_onnx(path, cnn, small_cnn, images(3))
    np.save(tmp_path / "x.npy", images(3))
    script = """
import sys
sys.modules["jax"] = None
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
session = onnxruntime.InferenceSession(sys.argv[1] + "/cnn.onnx", options)
found = session.run(None, {"input_0": np.load(sys.argv[1] + "/x.npy")})
np.save(sys.argv[1] + "/y.npy", found[1])
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    want = jax.jit(jc.lift(cnn))(small_cnn, images(3))["logits"]
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), want, rtol=0, atol=1e-3)


def test_refusals_name_what_is_refused(tmp_path):
    path, x = tmp_path / "model.onnx", jnp.ones((2, 64))
    params = {"w": jnp.ones((64, 64))}
    with pytest.raises(NotImplementedError, match=r"no form for the primitive 'sort' of float32"):
        jc.export_onnx(path, lambda params, x: jnp.sort(x @ params["w"]), params, x)
    small = jc.compress(params, jc.quantize("nf4", group_size=64), layout="in,out")
    with pytest.raises(TypeError, match=r"'w' of shape \(64, 64\) is a QuantizedArray nf4"):
        jc.export_onnx(path, lambda params, x: x @ params["w"], small, x)
    rows = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 64"), "float32")
    with pytest.raises(NotImplementedError, match="broadcast along a symbolic dimension"):
        jc.export_onnx(path, lambda p, x: x + jnp.ones((x.shape[0], 64)) @ p["w"], params, rows)
    assert not path.exists()
