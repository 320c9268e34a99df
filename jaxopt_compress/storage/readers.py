"""Checkpoints of several kinds as flat lists of leaves, each read when it is asked for."""

import contextlib
import functools
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.extras import require
from jaxopt_compress.storage.interchange import packed
from jaxopt_compress.storage.loading import is_checkpoint, load, load_shapes
from jaxopt_compress.tree import map_named, named_leaves
from jaxopt_compress.typing import Leaf, PyTree


class Source(NamedTuple):
    """A checkpoint that is open for reading.

    Attributes:
        kind: ``"jaxopt-compress"``, ``"orbax"`` or ``"safetensors"``.
        tree: The tree with a `jax.ShapeDtypeStruct` in the place of each array.
        read: ``read(path)`` returns one leaf.
        output_first: Whether kernels have their output axis first, as PyTorch writes them.
    """

    kind: str
    tree: PyTree
    read: Callable[[str], Leaf]
    output_first: bool = False


def open_checkpoint(path: str | os.PathLike[str]) -> Source:
    """Opens a checkpoint of `save`, any orbax checkpoint, or safetensors.

    Args:
        path: A directory; for safetensors also a file, or the ``.index.json`` of several. Of an
            orbax checkpoint manager, the directory of one step.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ModuleNotFoundError: It needs the package safetensors, which is not installed.
        ValueError: It is of no known kind, or holds several checkpoints.
    """
    root = pathlib.Path(path).expanduser().resolve()
    if not root.exists():
        raise FileNotFoundError(f"there is no checkpoint at {root}")
    if is_checkpoint(root):
        return _open_own(root)
    if files := _safetensors_files(root):
        return _open_safetensors(files)
    return _open_orbax(root)


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, PyTree]:
    """Reads tensors from safetensors, as nested dicts.

    Dots in names divide them: ``"model.0.weight"`` becomes ``"model/0/weight"``, the path that the
    command knows it by. Linear layers of PyTorch keep their weights as ``[out, in]``, unlike Flax.

    Args:
        path: A file, a folder of files, or the ``.index.json`` that says which files there are; one
            in the folder is followed.

    A folder whose ``config.json`` says that weights are quantized by GPTQ, AWQ or
    compressed-tensors is read into `QuantizedArray` leaves, ``[out, in]``, without another
    rounding.

    Returns:
        Dicts of JAX arrays on the default device. What JAX would narrow, such as int64 without
        ``jax_enable_x64``, stays an array of NumPy.

    Raises:
        FileNotFoundError: There is nothing at ``path``, or a file of the index is missing.
        ModuleNotFoundError: The package safetensors is not installed.
        ValueError: It is no safetensors, two tensors become one path (names both), or weights are
            quantized in a form that is not known here.

    Example:
        >>> import numpy as np, tempfile, jaxopt_compress as jc
        >>> from safetensors.numpy import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"fc.weight": np.ones((4, 2), np.float32)}, f"{folder}/m.safetensors")
        ...     params = jc.load_safetensors(folder)
        >>> params["fc"]["weight"].shape
        (4, 2)
    """
    root = pathlib.Path(path).expanduser().resolve()
    if not root.exists():
        raise FileNotFoundError(f"there is no checkpoint at {root}")
    files = _safetensors_files(root)
    if not files:
        raise ValueError(f"{root} is no file or folder of safetensors")
    source = _open_safetensors(files)

    def read(path: str, shape: jax.ShapeDtypeStruct | None) -> Leaf:
        x = source.read(path)
        return jnp.asarray(x) if jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype else x

    config = _quantization(root)
    if config is None:
        return map_named(read, source.tree)
    names = {path.replace("/", "."): path for path, _ in named_leaves(source.tree)}
    fields = packed.fields_of(names, config)
    parts = {name for own in fields.values() for name in own}
    leaves = {path: read(path, None) for name, path in names.items() if name not in parts}
    for name, own in fields.items():
        path = name.replace(".", "/")
        tensor = lambda name: source.read(names[name])
        leaves[path] = packed.read_leaf(path, own, tensor, config)
    return _nest(leaves)


def _quantization(root: pathlib.Path) -> dict[str, Any] | None:
    """What the folder says of quantized weights."""
    file = (root if root.is_dir() else root.parent) / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    return packed.quantization_of(config) if isinstance(config, dict) else None


def _open_own(root: pathlib.Path) -> Source:
    @functools.cache
    def leaves() -> dict[str, Leaf]:
        with warnings.catch_warnings():
            # Plain containers are what is wanted here.
            warnings.simplefilter("ignore")
            return dict(named_leaves(load(root)))

    return Source("jaxopt-compress", load_shapes(root), lambda path: leaves()[path])


def _open_orbax(root: pathlib.Path) -> Source:
    import orbax.checkpoint as ocp
    from etils import epath

    folder = _find_orbax(root)
    handler = ocp.PyTreeCheckpointHandler()
    try:
        found: Any = handler.metadata(epath.Path(folder))
        described = getattr(found, "tree", found)
    except Exception as error:
        raise ValueError(f"the orbax checkpoint {folder} cannot be read: {error}") from error
    tree = map_named(_abstract, described)

    def read(path: str) -> Leaf:
        item = map_named(lambda name, x: x if name == path else ocp.PLACEHOLDER, described)
        to_host = ocp.RestoreArgs(restore_type=np.ndarray)
        args = ocp.args.PyTreeRestore(item=item, restore_args=jax.tree.map(lambda _: to_host, item))
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                restored = checkpointer.restore(folder, args)
        except Exception as error:
            raise ValueError(f"{path!r} cannot be read from {folder}: {error}") from error
        return dict(named_leaves(restored))[path]

    return Source("orbax", tree, read)


def _find_orbax(root: pathlib.Path) -> pathlib.Path:
    """The one directory at most two levels down that holds arrays of orbax."""
    for depth in ("", "*/", "*/*/"):
        found = sorted(p.parent for p in root.glob(f"{depth}_METADATA"))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(str(p.relative_to(root)) for p in found[:8])
            raise ValueError(f"{root} holds several checkpoints, {names}: give the path of one")
    raise ValueError(
        f"{root} is no checkpoint that can be read: there are no files of jaxopt_compress.save, of "
        "orbax or of safetensors in it"
    )


def _abstract(path: str, x: Leaf) -> jax.ShapeDtypeStruct:
    del path
    return jax.ShapeDtypeStruct(tuple(x.shape or ()), x.dtype)


def _safetensors_files(root: pathlib.Path) -> list[pathlib.Path]:
    """The files of a checkpoint of safetensors; none if it is none."""
    indices = sorted(root.glob("*.safetensors.index.json")) if root.is_dir() else []
    if len(indices) > 1:
        names = ", ".join(index.name for index in indices)
        raise ValueError(f"{root} holds several checkpoints, {names}: give the path of one")
    if indices or root.name.endswith(".index.json"):
        return _files_of_index(indices[0] if indices else root)
    files = sorted(root.glob("*.safetensors")) if root.is_dir() else [root]
    return [file for file in files if file.suffix == ".safetensors"]


def _files_of_index(index: pathlib.Path) -> list[pathlib.Path]:
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        files = sorted(index.parent / name for name in names)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is no index of safetensors: it has no weight_map") from error
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise FileNotFoundError(f"{index} names {', '.join(missing)}, which is not beside it")
    return files


def _open_safetensors(files: list[pathlib.Path]) -> Source:
    safetensors = require("safetensors", extra="examples")

    @contextlib.contextmanager
    def opened(file: pathlib.Path):
        try:
            with safetensors.safe_open(file, "numpy") as tensors:
                yield tensors
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error

    where: dict[str, tuple[pathlib.Path, str]] = {}  # Path -> the file and the name in it.
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    output_first = False
    for file in files:
        with opened(file) as tensors:
            output_first |= (tensors.metadata() or {}).get("format") == "pt"
            for key in tensors.keys():
                path = key.replace(".", "/")
                if path in where:
                    first, other = where[path]
                    raise ValueError(
                        f"{other!r} in {first.name} and {key!r} in {file.name} are two tensors of "
                        f"the path {path!r}: rename one, or leave one of the files out"
                    )
                where[path] = file, key
                part = tensors.get_slice(key)
                shapes[path] = jax.ShapeDtypeStruct(part.get_shape(), _dtype(part.get_dtype(), key))

    def read(path: str) -> Leaf:
        file, key = where[path]
        with opened(file) as tensors:
            return tensors.get_tensor(key)

    return Source("safetensors", _nest(shapes), read, output_first)


def _dtype(name: str, key: str) -> np.dtype:
    dtypes = {
        "BOOL": "bool",
        "BF16": "bfloat16",
        "C64": "complex64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
    }
    for letter, kind in (("F", "float"), ("I", "int"), ("U", "uint")):
        dtypes |= {f"{letter}{bits}": f"{kind}{bits}" for bits in (8, 16, 32, 64)}
    if name not in dtypes:
        raise ValueError(f"tensor {key!r} has the dtype {name}, which is not known here")
    return np.dtype(dtypes[name])


def _nest(leaves: Mapping[str, Leaf]) -> dict[str, PyTree]:
    """Nested dicts from ``/``-joined paths."""
    tree: dict[str, PyTree] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path!r} lies below a tensor of the name {parent!r}")
        if name in node:
            raise ValueError(f"{path!r} is the name of a tensor and of a group of tensors")
        node[name] = leaf
    return tree
