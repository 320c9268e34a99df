"""Writes packed.npz: weights packed by AutoGPTQ and AutoAWQ; README.md says how to run it.

Both packages import much that packing does not need, so that only the files that pack are loaded,
from where the packages were unpacked.
"""

import argparse
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch

OUT, IN, GROUP = 32, 64, 16
VERSIONS = ["auto-gptq==0.7.1", "autoawq==0.2.9"]


def loaded(file, **stand_ins):
    """A module from its file, with names that it imports and packing does not use."""
    for name, attributes in stand_ins.items():
        module = types.ModuleType(name.replace("__", "."))
        module.__dict__.update(attributes)
        sys.modules[module.__name__] = module
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(bits, seed):
    """Codes [out, in], zero points and steps [out, groups]; a first zero point is 1, the least."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (OUT, IN))
    zeros = rng.integers(1, 2**bits, (OUT, IN // GROUP))
    zeros[0, 0] = 1
    return codes, zeros, rng.uniform(0.1, 1, (OUT, IN // GROUP)).astype(np.float16)


def linear_of(codes, zeros, scales):
    """A layer whose weights are on the grid, in float32."""
    spread = lambda x: np.repeat(x.astype(np.float32), GROUP, 1)
    layer = torch.nn.Linear(IN, OUT, bias=False)
    layer.weight.data = torch.from_numpy((codes - spread(zeros)) * spread(scales))
    return layer


def gptq(folder, bits):
    file = folder / "auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py"
    conv = types.SimpleNamespace(Conv1D=type(None))
    module = loaded(file, transformers={"pytorch_utils": conv})
    codes, zeros, scales = numbers(bits, bits)
    layer = linear_of(codes, zeros, scales)
    packed = module.QuantLinear(bits, GROUP, IN, OUT, bias=False, weight_dtype=torch.float32)
    as_float = lambda x: torch.from_numpy(x.astype(np.float32))
    packed.pack(layer, as_float(scales), as_float(zeros), None)
    return packed, codes, layer


def awq(folder):
    stand_ins = {
        "awq": {},
        "awq__utils": {},
        "awq__utils__module": {"try_import": lambda name: (None, "")},
        "awq__utils__utils": {"get_best_device": lambda: "cpu"},
        "awq__utils__packing_utils": {"dequantize_gemm": None},
    }
    module = loaded(folder / "awq/modules/linear/gemm.py", **stand_ins)
    codes, zeros, scales = numbers(4, 0)
    layer = linear_of(codes, zeros, scales)
    as_float = lambda x: torch.from_numpy(x.T.astype(np.float32).copy())
    given = {"scales": as_float(scales), "zeros": as_float(zeros)}
    return module.WQLinear_GEMM.from_linear(layer, 4, GROUP, **given), codes, layer


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("sources", type=Path, help="where both packages are unpacked")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    found = {f"gptq{bits}": gptq(args.sources, bits) for bits in (2, 3, 4, 8)}
    found["awq4"] = awq(args.sources)
    arrays = {"versions": VERSIONS}
    for name, (packed, codes, layer) in found.items():
        own = {k: v.numpy() for k, v in packed.state_dict().items()}
        own |= {"codes": codes.astype(np.uint8), "dequantized": layer.weight.detach().numpy()}
        arrays |= {f"{name}/{k}": v for k, v in own.items()}
    np.savez_compressed(args.out / "packed.npz", **arrays)


if __name__ == "__main__":
    main()
