"""Reads files of ours by the libraries they are for; `make interop` installs these and runs it."""

import json
import sys
import tempfile
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.torch import load_file

import jaxopt_compress as jc


def small(method):
    w = {"fc": {"weight": jax.random.normal(jax.random.key(0), (24, 64))}}
    return jc.compress(w, method, layout="out,in")


def read_compressed_tensors(folder):
    """Codes, zero points and dense weights are those that were written, for each width."""
    from compressed_tensors.compressors.pack_quantized import helpers
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import dequantize

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
            config = QuantizationConfig.model_validate(config_of(path))
            args = config.config_groups["group_0"].weights
            dense = dequantize(codes, tensors["fc.weight_scale"], zero, args)
            np.testing.assert_allclose(dense, jc.materialize(tree)["fc"]["weight"], rtol=1e-6)


def config_of(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def read_two_of_four(folder):
    """By the functions of compressed-tensors up to 0.10, as later ones have no 2:4 form."""
    from compressed_tensors.compressors.sparse_compressors import sparse_24_bitmask as reference
    from compressed_tensors.config import SparsityCompressionConfig

    prune = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), "2:4")
    tree = small(prune)
    jc.save_safetensors(folder / "sparse", tree)
    tensors = load_file(folder / "sparse" / "model.safetensors")
    own = {k: tensors[f"fc.{k}"] for k in ("shape", "compressed", "bitmask")}
    found = reference.Sparse24BitMaskTensor.from_compressed_data(**own).decompress()
    np.testing.assert_array_equal(found.numpy(), jc.materialize(tree)["fc"]["weight"])
    config = config_of(folder / "sparse")["sparsity_config"]
    SparsityCompressionConfig.load_from_registry(config.pop("format"), **config)
    written = reference.Sparse24BitMaskTensor.from_dense(found).dict("fc")
    np.testing.assert_array_equal(written["fc.bitmask"], own["bitmask"])
    np.testing.assert_array_equal(written["fc.compressed"], own["compressed"])


def read_gguf(folder):
    for name in ("int4", "int8"):
        tree = small(jc.quantize(name, group_size=32, scale_dtype="float16"))
        jc.save_gguf(folder / f"{name}.gguf", tree, "llama")
        (tensor,) = gguf.GGUFReader(folder / f"{name}.gguf").tensors
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_allclose(found, jc.materialize(tree)["fc"]["weight"], rtol=1e-6)


def main():
    with tempfile.TemporaryDirectory() as folder:
        # The older package has a place of its own.
        readers = (
            (read_two_of_four,) if "--sparse" in sys.argv else (read_gguf, read_compressed_tensors)
        )
        for read in readers:
            read(Path(folder))
            print(read.__name__, "ok")


if __name__ == "__main__":
    main()
