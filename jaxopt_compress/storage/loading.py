"""Restoring trees that hold compressed arrays, whole or in part."""

import os
import warnings
from typing import Any, NamedTuple

import jax

from jaxopt_compress.storage.coding import check_sizes
from jaxopt_compress.storage.coding import read as read_coded
from jaxopt_compress.storage.decoding import decode
from jaxopt_compress.storage.folder import (
    DOCUMENT,
    LOCK,
    CheckpointError,
    is_data,
    read_raw,
    resolve,
    unsealed,
)
from jaxopt_compress.storage.schema import (
    CODED_VERSION,
    NAME,
    VERSION,
    Decoded,
    Entry,
    Outside,
)
from jaxopt_compress.storage.stored import damaged, read
from jaxopt_compress.storage.templates import match
from jaxopt_compress.tree import map_named, named_leaves
from jaxopt_compress.typing import PyTree


def load(path: str | os.PathLike[str], like: PyTree = None) -> PyTree:
    """Restores what `save` has written.

    Args:
        path: The directory.
        like: A tree of any containers whose leaves have the same paths: the result has its
            structure, and its shardings where its leaves have any (arrays, or
            `jax.ShapeDtypeStruct` with a sharding; that of a dense leaf also places a compressed
            array, as in `shard`). A leaf that is ``...`` is not read and stays ``...``, as with
            orbax's ``PLACEHOLDER``. Without it, dicts, lists and tuples come back as they were, and
            other containers as dicts.

    Returns:
        The tree: equal leaves of the same types, on the default device without shardings.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        CheckpointError: It is no checkpoint of this package, is of another version, or is damaged;
            names the file and the leaf.
        ValueError: ``like`` does not fit.

    Example:
        Only a part of a checkpoint:

        >>> import tempfile, jax.numpy as jnp, jaxopt_compress as jc
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     jc.save(f"{folder}/small", {"head": jnp.ones(2), "body": jnp.ones(3)})
        ...     jc.load(f"{folder}/small", like={"head": ..., "body": jnp.zeros(3)})
        {'body': Array([1., 1., 1.], dtype=float32), 'head': Ellipsis}
    """
    root = resolve(path)
    while True:
        raw = read_raw(root)
        try:
            return _load(root, raw, like)
        except CheckpointError:
            # Read again what somebody has replaced in the meantime.
            if read_raw(root) == raw:
                raise


def _load(root: Any, raw: bytes, like: PyTree) -> PyTree:
    decoded = (opened := _opened(root, raw)).decoded
    if like is not None:
        stored, placed = match(decoded.tree, like)
        values = _read_arrays(root, opened, stored, placed)
        return map_named(lambda name, _: values[name], like)
    outside = [(k, x) for k, x in named_leaves(decoded.tree) if isinstance(x, Outside)]
    if outside:
        name, function = outside[0]
        raise ValueError(
            f"the checkpoint at {root} holds only the name of {name!r}, the function "
            f"{function.name}: pass like= with a tree that has it, such as the module"
        )
    shardings = jax.tree.map(lambda _: None, decoded.tree)
    tree = _read_arrays(root, opened, decoded.tree, shardings)
    if decoded.converted:
        warnings.warn(
            f"{', '.join(sorted(set(decoded.converted)))} in {root} come back as "
            "dicts; pass like= with a tree of the wanted structure",
            stacklevel=3,
        )
    return tree


def load_shapes(path: str | os.PathLike[str]) -> PyTree:
    """The tree of a checkpoint, with a `jax.ShapeDtypeStruct` in the place of each array.

    Reads no data. Raises as `load`.
    """
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, Entry) else x
    root = resolve(path)
    return jax.tree.map(abstract, _opened(root, read_raw(root)).decoded.tree)


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether there is a checkpoint of this package at ``path``, of whatever version or state."""
    root = resolve(path)
    return (root / DOCUMENT).exists() or (root / LOCK).exists()


class _Opened(NamedTuple):
    """The subfolder of data, the tree, and whether its arrays are coded."""

    data: str | None
    decoded: Decoded
    coded: bool


def _opened(root: Any, raw: bytes) -> _Opened:
    file = root / DOCUMENT
    try:
        document = unsealed(raw)
    except (ValueError, RecursionError) as error:
        raise damaged(file, error) from error
    if not isinstance(document, dict) or document.get("format") != NAME:
        raise CheckpointError(f"{file} is no checkpoint of jaxopt_compress.save: another format")
    version = document.get("version")
    if type(version) is not int:
        raise damaged(file, f"version {version!r}")
    if version > CODED_VERSION:
        raise CheckpointError(
            f"{file} has version {version} of the format and this package reads versions {VERSION} "
            f"and {CODED_VERSION}: install a newer jaxopt-compress"
        )
    if version < VERSION:
        raise CheckpointError(
            f"{file} has version {version} of the format, from before it was settled, and this "
            f"package reads versions {VERSION} and {CODED_VERSION}: save it anew"
        )
    try:
        coded = version == CODED_VERSION
        names = {"format", "version", "data", "checksums", "tree"}
        if set(document) != (names | {"coding", "chunks"} if coded else names):
            raise ValueError(f"a document of {sorted(document)}")
        chunks = document["chunks"] if coded else None
        data, decoded = document["data"], decode(document["tree"], document["checksums"], chunks)
        if bool(document["checksums"]) != is_data(data):
            raise ValueError(f"data in {data!r}")
        return _Opened(data, decoded, coded)
    except (ValueError, RecursionError) as error:
        raise damaged(file, error) from error


def _read_arrays(root: Any, opened: _Opened, tree: PyTree, shardings: PyTree) -> PyTree:
    """The tree with arrays in the place of entries, on ``shardings`` where these are not None."""
    leaves, treedef = jax.tree.flatten(tree)
    pairs = list(zip(leaves, treedef.flatten_up_to(shardings), strict=True))
    wanted = [(x, s) for x, s in pairs if isinstance(x, Entry)]
    folder = root / (opened.data or "")
    if opened.coded and wanted:
        every = jax.tree.leaves(opened.decoded.tree)
        check_sizes(folder, [x for x in every if isinstance(x, Entry)])
    found = (read_coded if opened.coded else read)(folder, wanted)
    return treedef.unflatten([next(found) if isinstance(x, Entry) else x for x in leaves])
