"""Trees as safetensors, quantized weights as compressed-tensors knows them."""

import json
import os
import pathlib

import numpy as np

from jaxopt_compress.arrays import InputQuantizedArray, SparseArray, is_compressed
from jaxopt_compress.extras import require
from jaxopt_compress.storage.interchange import sparse
from jaxopt_compress.storage.interchange.fields import Linear, linear_of, pack_words
from jaxopt_compress.tree import named_leaves
from jaxopt_compress.typing import Leaf, PyTree


def save_safetensors(
    path: str | os.PathLike[str], tree: PyTree, layout: str = "out,in", overwrite: bool = False
) -> None:
    """Writes a tree as a folder of safetensors, for PyTorch and servers such as vLLM.

    Dense arrays are written as they are. A `QuantizedArray`, also one whose activations are rounded
    to int8 at run time, becomes the tensors of the package
    compressed-tensors: 8-bit integers as ``weight``, fewer bits as ``weight_packed``, and
    ``weight_scale``, ``weight_zero_point``; ``config.json`` says so. A 2:4 `SparseArray` of floats
    becomes ``sparse-24-bitmask``, which that package reads up to version 0.10. `load_safetensors`
    reads the folder back, bit for bit.

    Args:
        path: A new folder.
        tree: Dicts of arrays, and of `QuantizedArray` matrices of integers and 2:4 sparse ones
            whose paths end in ``weight``; paths are joined by dots.
        layout: The axes of quantized matrices: ``"out,in"`` as in PyTorch, or ``"in,out"`` as in
            Flax; these are turned. Dense arrays are never turned.
        overwrite: Whether a file that is there is replaced.

    Raises:
        FileExistsError: There is something at ``path``.
        ModuleNotFoundError: The package safetensors is not installed.
        ValueError: A leaf has no such form; names its path and what would have one.

    Example:
        >>> import jax, tempfile, jaxopt_compress as jc
        >>> params = {"fc": {"weight": jax.random.normal(jax.random.key(0), (8, 64))}}
        >>> small = jc.compress(params, jc.quantize("int4", group_size=32), layout="out,in")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     jc.save_safetensors(f"{folder}/m", small)
        ...     jc.load_safetensors(f"{folder}/m")["fc"]["weight"]
        QuantizedArray(int4 g32, float32[8,64], 5 bits per weight, 320 bytes)
    """
    write = require("safetensors.numpy", extra="examples").save_file
    root = pathlib.Path(path).expanduser()
    file = root / "model.safetensors"
    if root.exists() and (not root.is_dir() or (any(root.iterdir()) and not overwrite)):
        raise FileExistsError(f"{root} exists: choose another path, or pass overwrite=True")
    if others := sorted(p.name for p in root.glob("*.safetensors*") if p.name not in _OWN):
        raise FileExistsError(f"{root} holds {others[0]!r} too, which readers would take instead")
    tensors, config = _written(tree, layout)
    root.mkdir(parents=True, exist_ok=True)
    beside = root / "model.safetensors.part"
    write(tensors, beside, metadata={"format": "pt"})
    os.replace(beside, file)
    _write_config(root, config)


def _written(
    tree: PyTree, layout: str
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, object]]]:
    """The tensors of a tree, and what ``config.json`` says of them."""
    tensors: dict[str, np.ndarray] = {}
    schemes: dict[str, list[str]] = {}
    sparse_ones: list[str] = []
    for name, leaf in named_leaves(tree):
        key = name.replace("/", ".")
        if not is_compressed(leaf):
            _add(tensors, name, {key: np.ascontiguousarray(leaf).reshape(np.shape(leaf))})
            continue
        stem, _, last = key.rpartition(".")
        if last != "weight":
            raise ValueError(f"{name!r} cannot be written quantized: its path has to end in weight")
        if isinstance(leaf, SparseArray):
            own = sparse.tensors_of(name, leaf, layout)
            sparse_ones.append(stem)
        else:
            leaf, inputs = _without_inputs(name, leaf)
            linear = linear_of(name, leaf, layout)
            own = _tensors(linear)
            schemes.setdefault(json.dumps([_scheme(linear), inputs]), []).append(stem)
        _add(tensors, name, {f"{stem}.{k}": np.ascontiguousarray(x) for k, x in own.items()})
    if not schemes and not sparse_ones:
        return tensors, {}
    config = _config(schemes)
    if sparse_ones:
        every = [stem for stems in schemes.values() for stem in stems] + sparse_ones
        config["quantization_config"]["sparsity_config"] = sparse.config_of(every, sparse_ones)
    return tensors, config


_OWN = ("model.safetensors", "model.safetensors.part")


def _add(tensors: dict[str, np.ndarray], name: str, new: dict[str, np.ndarray]) -> None:
    if both := sorted(tensors.keys() & new.keys()):
        raise ValueError(f"{name!r} cannot be written: another leaf is {both[0]!r} in the file too")
    tensors |= new


def _write_config(root: pathlib.Path, own: dict[str, dict[str, object]]) -> None:
    """Says in ``config.json`` how weights are stored, and leaves the model's own keys."""
    path = root / "config.json"
    there = json.loads(path.read_text("utf-8")) if path.exists() else {}
    others = {k: v for k, v in there.items() if k not in _QUANTIZATION}
    config = others | own
    if config or there:
        beside = root / "config.json.part"
        beside.write_text(json.dumps(config, indent=2), "utf-8")
        os.replace(beside, path)


_QUANTIZATION = ("quantization_config", "compression_config")


def _without_inputs(name: str, leaf: Leaf) -> tuple[Leaf, dict[str, object] | None]:
    """The weight itself, and how activations that meet it are rounded."""
    if not isinstance(leaf, InputQuantizedArray):
        return leaf, None
    if leaf.format != "int8" or leaf.scale is not None or leaf.offset is not None:
        raise ValueError(
            f"{name!r} cannot be written: only activations in int8 with a scale per row at run "
            f"time have a form, not {leaf.describe()}; write its weight alone"
        )
    own = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return leaf.weight, own


def _tensors(own: Linear) -> dict[str, np.ndarray]:
    codes, zero = own.codes, own.zero
    half = 1 << (own.bits - 1)
    if codes.dtype == np.uint8:
        codes = (codes.astype(np.int16) - half).astype(np.int8)
        zero = zero.astype(np.int16) - half if zero is not None else np.full(own.scale.shape, -half)
    found = {"weight_scale": own.scale}
    if zero is not None:
        found["weight_zero_point"] = _narrow(zero, half)
    if own.bits == 8:
        return {"weight": codes, **found}
    if zero is not None:
        shifted = (found["weight_zero_point"].astype(np.int16) + half).astype(np.uint8)
        found["weight_zero_point"] = pack_words(np.ascontiguousarray(shifted.T), own.bits).T
    shifted = (codes.astype(np.int16) + half).astype(np.uint8)
    shape = np.array(codes.shape, np.int64)
    return {"weight_packed": pack_words(shifted, own.bits), "weight_shape": shape, **found}


def _narrow(zero: np.ndarray, half: int) -> np.ndarray:
    if zero.min() < -half or zero.max() >= half:
        raise ValueError(
            f"zero points from {zero.min()} to {zero.max()} do not fit between {-half} and "
            f"{half - 1}, as in compressed-tensors"
        )
    return zero.astype(np.int8)


def _scheme(own: Linear) -> dict[str, object]:
    return {
        "num_bits": own.bits,
        "type": "int",
        "symmetric": own.zero is None and own.codes.dtype == np.int8,
        "strategy": "channel" if own.group_size is None else "group",
        "group_size": own.group_size,
        "dynamic": False,
    }


def _config(schemes: dict[str, list[str]]) -> dict[str, dict[str, object]]:
    groups, formats = {}, set()
    for i, (text, targets) in enumerate(schemes.items()):
        weights, inputs = json.loads(text)
        form = "int-quantized" if weights["num_bits"] == 8 else "pack-quantized"
        formats.add(form)
        groups[f"group_{i}"] = {
            "targets": targets,
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": form,
        }
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": _format(formats),
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [],
        }
    }


def _format(formats: set[str]) -> str:
    """That of all groups, if they have one."""
    return "mixed-precision" if len(formats) > 1 else next(iter(formats), "dense")
