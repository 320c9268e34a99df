"""GGUF files, whose quantized blocks are those of llama.cpp."""

import os
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.extras import require
from jaxopt_compress.storage.interchange.fields import Linear, leaf_of, linear_of
from jaxopt_compress.tree import named_leaves
from jaxopt_compress.typing import Leaf, PyTree

_BLOCK = 32
_PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
# The dtypes that the package gguf takes as they are.
_DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "bfloat16")


def load_gguf(path: str | os.PathLike[str]) -> dict[str, Leaf]:
    """Reads the tensors of a GGUF file, as a flat dict by their names.

    Q4_0 and Q8_0 become `QuantizedArray` leaves, int4 and int8 in groups of 32 with float16 scales,
    without another rounding. Other blocks have no such form (the minimum of a Q4_1 block is a
    float, not a whole number of steps) and come back dense, in float32. Matrices are ``[out, in]``.

    Args:
        path: A file.

    Returns:
        Name -> array or `QuantizedArray`; 64 bits as a numpy array where JAX has only 32.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ModuleNotFoundError: The package gguf is not installed.
        ValueError: It is no GGUF file.

    Example:
        >>> import jax, tempfile, jaxopt_compress as jc
        >>> w = {"w": jax.random.normal(jax.random.key(0), (4, 64))}
        >>> how = jc.quantize("int8", group_size=32, scale_dtype="float16")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     jc.save_gguf(f"{folder}/m.gguf", jc.compress(w, how, layout="out,in"), "llama")
        ...     jc.load_gguf(f"{folder}/m.gguf")["w"].describe()
        'int8 g32'
    """
    gguf = require("gguf", extra="examples")
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no file at {file}")
    try:
        tensors = gguf.GGUFReader(file).tensors
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{file} cannot be read as GGUF: {error}") from error
    return {tensor.name: _read(gguf, tensor) for tensor in tensors}


def _read(gguf: ModuleType, tensor: Any) -> Leaf:
    # A copy: the reader maps the file, which may be replaced.
    kind, data = tensor.tensor_type, np.array(tensor.data)
    if kind.name in ("Q4_0", "Q8_0") and len(tensor.shape) == 2:
        return leaf_of(from_blocks(data, kind.name))
    if kind.name == "BF16":
        return jnp.asarray(data.view(jnp.bfloat16))
    if kind.name in _PLAIN:
        # JAX would round 64 bits to 32, and wrap integers, unless it is told not to.
        same = jax.dtypes.canonicalize_dtype(data.dtype) == data.dtype
        return jnp.asarray(data) if same else data
    return jnp.asarray(gguf.quants.dequantize(data, kind))


def save_gguf(
    path: str | os.PathLike[str],
    tree: PyTree,
    architecture: str,
    layout: str = "out,in",
    types: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a tree as a GGUF file.

    A `QuantizedArray` of int4 or int8 in groups of 32 with float16 scales becomes Q4_0 or Q8_0 with
    the same codes and scales.

    Args:
        path: A new file.
        tree: Dicts of arrays; names are paths joined by dots, and have to be those that the
            architecture knows.
        architecture: What the file says it is, such as ``"llama"``.
        layout: The order of the axes of quantized matrices, as in `save_safetensors`.
        types: Path of a dense matrix -> block type, such as ``{"output/weight": "Q4_1"}``, for
            matrices that are rounded here, by the package gguf.
        overwrite: Whether a file that is there is replaced.

    Raises:
        FileExistsError: There is something at ``path``.
        ModuleNotFoundError: The package gguf is not installed.
        ValueError: A leaf has no such form; names its path and what would have one.
    """
    gguf = require("gguf", extra="examples")
    file = pathlib.Path(path).expanduser()
    if file.exists() and not (overwrite and file.is_file()):
        raise FileExistsError(f"{file} exists: choose another path, or pass overwrite=True")
    leaves, types = dict(named_leaves(tree)), dict(types or {})
    unknown = [name for name in types if name not in leaves or is_compressed(leaves[name])]
    if unknown:
        raise ValueError(f"types has {unknown[0]!r}, which is no dense array of the tree")
    beside = file.with_name(f"{file.name}.part")
    writer = gguf.GGUFWriter(beside, architecture)
    for name, leaf in leaves.items():
        data, kind = _blocks(gguf, name, leaf, layout, types.get(name))
        writer.add_tensor(name.replace("/", "."), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(beside, file)


def _blocks(
    gguf: ModuleType, name: str, leaf: Leaf, layout: str, kind: str | None
) -> tuple[np.ndarray, Any]:
    types = gguf.GGMLQuantizationType
    if is_compressed(leaf):
        own = linear_of(name, leaf, layout)
        try:
            return to_blocks(own), types.Q8_0 if own.bits == 8 else types.Q4_0
        except ValueError as error:
            raise ValueError(
                f"{name!r} of shape {leaf.shape} cannot be written: {error}"
            ) from error
    x = np.ascontiguousarray(leaf).reshape(np.shape(leaf))
    if kind is not None:
        return _rounded(gguf, name, x, kind), types[kind]
    if x.dtype.name not in _DTYPES:
        raise ValueError(
            f"{name!r} of shape {x.shape} and {x.dtype} cannot be written: GGUF has floats of 16 "
            "to 64 bits and signed integers of 8 to 64; cast it, or leave it out"
        )
    if x.dtype == jnp.bfloat16:
        # Words of bytes have an axis at least, so a scalar takes the next larger float.
        return (x.view(np.uint8), types.BF16) if x.ndim else (x.astype(np.float32), None)
    return x, None


def _rounded(gguf: ModuleType, name: str, x: np.ndarray, kind: str) -> np.ndarray:
    """The blocks of a dense matrix, by the package gguf."""
    refuse = lambda why: ValueError(f"{name!r} of shape {x.shape} as {kind!r}: {why}")
    types = gguf.GGMLQuantizationType
    if kind not in types.__members__ or x.ndim < 2:
        raise refuse("no type of its blocks")
    if not np.isfinite(x := np.asarray(x, np.float32)).all():
        raise refuse("blocks hold no NaN and no infinity")
    if x.shape[-1] % (size := gguf.GGML_QUANT_SIZES[types[kind]][0]):
        raise refuse(f"its last axis is no multiple of the {size} entries of a block")
    try:
        return gguf.quants.quantize(x, types[kind])
    except NotImplementedError as error:
        raise refuse("the package gguf cannot write this type") from error


def from_blocks(raw: np.ndarray, kind: str) -> Linear:
    """Codes and scales of blocks.

    Args:
        raw: uint8, [rows, bytes].
        kind: ``"Q4_0"`` or ``"Q8_0"``.
    """
    size = 18 if kind == "Q4_0" else 34
    blocks = np.ascontiguousarray(raw).reshape(len(raw), raw.shape[1] // size, size)
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float16)
    if kind == "Q8_0":
        codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    else:
        # Entries i and i + 16 share a byte.
        both = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1)
        codes = both.astype(np.int8) - np.int8(8)
    return Linear(
        codes.reshape(len(raw), blocks.shape[1] * _BLOCK),
        scale,
        None,
        8 if kind == "Q8_0" else 4,
        _BLOCK,
    )


def to_blocks(own: Linear) -> np.ndarray:
    """Inverts `from_blocks`.

    Raises:
        ValueError: The weight is of another form.
    """
    scale = own.scale.astype(np.float16)
    if own.group_size != _BLOCK or own.bits not in (4, 8) or own.codes.dtype != np.int8:
        raise ValueError("GGUF has signed int4 and int8 in groups of 32 along the inputs")
    if own.zero is not None:
        raise ValueError("GGUF has no zero points; materialize it, and ask for Q4_1 by types=")
    if not np.array_equal(scale.astype(np.float64), own.scale.astype(np.float64)):
        raise ValueError("scales are stored in float16; quantize with scale_dtype='float16'")
    rows, columns = own.codes.shape
    codes = own.codes.reshape(rows, columns // _BLOCK, _BLOCK)
    if own.bits == 8:
        body = codes.view(np.uint8)
    else:
        shifted = (codes + np.int8(8)).astype(np.uint8)
        body = shifted[..., :16] | shifted[..., 16:] << np.uint8(4)
    head = np.ascontiguousarray(scale.astype("<f2"))[..., None].view(np.uint8)
    blocks = np.concatenate([head, body], -1)
    return blocks.reshape(rows, columns // _BLOCK * blocks.shape[-1])
