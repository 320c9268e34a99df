"""2:4 sparse weights in safetensors of compressed-tensors, and forms without a place there."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxopt_compress as jc

OUT, IN = 24, 64


@pytest.mark.parametrize("layout", ["out,in", "in,out"])
def test_two_of_four(layout, tmp_path):
    """As the package lays them out: kept floats, bits of the mask lowest first, and the shape."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal((OUT, IN)).astype(np.float32)
    w[0, :4] = 0  # Fewer than two: two are stored all the same.
    given = jnp.asarray(w if layout == "out,in" else w.T)
    prune = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), "2:4")
    tree = {"fc": {"weight": given, "bias": jnp.ones(OUT)}}
    small = jc.compress(tree, prune, layout=layout)
    jc.save_safetensors(tmp_path / "m", small, layout)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert set(tensors) == {"fc.bias", "fc.compressed", "fc.bitmask", "fc.shape"}
    bits = np.unpackbits(tensors["fc.bitmask"], axis=1, bitorder="little").astype(bool)
    assert (bits.reshape(OUT, -1, 4).sum(-1) == 2).all()
    want = np.zeros((OUT, IN), np.float32)
    want[bits] = tensors["fc.compressed"].ravel()
    turned = want if layout == "out,in" else want.T
    np.testing.assert_array_equal(turned, small["fc"]["weight"].materialize())
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert config["sparsity_config"]["format"] == "sparse-24-bitmask"
    leaf = jc.load_safetensors(tmp_path / "m")["fc"]["weight"]
    assert leaf.pattern == (2, 4) and leaf.nbytes == small["fc"]["weight"].nbytes
    np.testing.assert_array_equal(leaf.materialize(), want)


def test_other_sparse_forms_are_refused(tmp_path):
    w = jnp.asarray(np.random.default_rng(4).standard_normal((OUT, IN)), jnp.float32)
    prune = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5))
    small = jc.compress({"fc": {"weight": w}}, prune, layout="out,in")
    with pytest.raises(ValueError, match=r"'fc/weight' .* prune with pattern='2:4'"):
        jc.save_safetensors(tmp_path / "m", small)


def test_two_of_four_that_are_quantized_too_and_unknown_layouts_are_refused(tmp_path):
    """Neither is read or written in another meaning."""
    w = jnp.asarray(np.random.default_rng(4).standard_normal((OUT, IN)), jnp.float32)
    small = jc.compress(
        {"fc": {"weight": w}}, jc.prune(jc.scores.magnitude(), pattern="2:4"), layout="out,in"
    )
    with pytest.raises(ValueError, match="layout='out, in'"):
        jc.save_safetensors(tmp_path / "m", small, layout="out, in")
    jc.save_safetensors(tmp_path / "m", small)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["fc.compressed"] = tensors["fc.compressed"].astype(np.int8)
    tensors["fc.weight_scale"] = np.full((OUT, 1), 0.01, np.float32)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match="quantized too"):
        jc.load_safetensors(tmp_path / "m")
