"""Reads files of ours by the libraries they are for; `make interop` installs these and runs it."""

import json
import tempfile
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized import helpers
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file

import jaxopt_compress as jc


def small(method):
    w = {"fc": {"weight": jax.random.normal(jax.random.key(0), (24, 64))}}
    return jc.compress(w, method, layout="out,in")


def read_compressed_tensors(folder):
    """Codes and zero points are those that were written, for each width."""
    for bits in range(2, 9):
        for symmetric in (True, False):
            tree = small(jc.quantize(f"int{bits}", group_size=32, symmetric=symmetric))
            path = folder / f"int{bits}-{symmetric}"
            jc.save_safetensors(path, tree)
            leaf, tensors = tree["fc"]["weight"], load_file(path / "model.safetensors")
            codes, zero = tensors.get("fc.weight"), tensors.get("fc.weight_zero_point")
            if bits < 8:
                shape = torch.Size(tensors["fc.weight_shape"].tolist())
                codes = helpers.unpack_from_int32(tensors["fc.weight_packed"], bits, shape)
                if zero is not None:
                    shape = torch.Size(leaf.scale.shape)
                    zero = helpers.unpack_from_int32(zero, bits, shape, packed_dim=0)
            np.testing.assert_array_equal(
                codes.numpy(), np.asarray(leaf.unpacked().astype(jnp.int8))
            )
            if not symmetric:
                np.testing.assert_array_equal(zero.numpy(), np.asarray(leaf.zero))
            QuantizationConfig.model_validate(config_of(path))


def config_of(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def read_gguf(folder):
    for name in ("int4", "int8"):
        tree = small(jc.quantize(name, group_size=32, scale_dtype="float16"))
        jc.save_gguf(folder / f"{name}.gguf", tree, "llama")
        (tensor,) = gguf.GGUFReader(folder / f"{name}.gguf").tensors
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_allclose(found, jc.materialize(tree)["fc"]["weight"], rtol=1e-6)


def main():
    with tempfile.TemporaryDirectory() as folder:
        read_gguf(Path(folder))
        read_compressed_tensors(Path(folder))
    print("read by gguf and compressed-tensors")


if __name__ == "__main__":
    main()
