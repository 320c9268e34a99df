"""Saving and restoring trees that hold compressed arrays, through orbax."""

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from jaxopt_compress.storage.coding import check_coding, check_sizes
from jaxopt_compress.storage.coding import read as read_coded
from jaxopt_compress.storage.coding import write as write_coded
from jaxopt_compress.storage.decoding import decode
from jaxopt_compress.storage.folder import (
    DOCUMENT,
    LOCK,
    CheckpointError,
    claimed,
    flush,
    is_data,
    read_raw,
    replace_document,
    resolve,
    sealed,
    unsealed,
)
from jaxopt_compress.storage.processes import from_first, is_first, wait_for_all
from jaxopt_compress.storage.schema import (
    CODED_VERSION,
    NAME,
    VERSION,
    Decoded,
    Entry,
    Outside,
    encode,
)
from jaxopt_compress.storage.stored import damaged, read, write
from jaxopt_compress.storage.templates import match
from jaxopt_compress.tree import map_named, named_leaves
from jaxopt_compress.typing import PyTree

# Orbax counts what it does by process, not by thread.
_ONE_AT_A_TIME = threading.Lock()


def save(
    path: str | os.PathLike[str],
    tree: PyTree,
    overwrite: bool = False,
    *,
    coding: str | None = None,
) -> None:
    """Saves a tree with compressed arrays, so that `load` needs no template.

    Codes are packed to their true width, so that the files take `nbytes` of the tree and some KB. A
    process that is killed, or a disk that is full, leaves the old checkpoint or the new one, whole.
    Sharded arrays are packed shard by shard and written by the processes that hold them. Several
    threads and processes may save at once, also to one path.

    Args:
        path: A new directory, local or remote as orbax understands it.
        tree: Arrays of JAX or NumPy, compressed arrays, numbers, strings and None in dicts, lists
            and tuples, with string or integer keys. Other pytree nodes (named tuples,
            `flax.nnx.State`, dataclasses) are saved as dicts of their children.
        overwrite: Whether a checkpoint that is there is replaced.
        coding: How arrays are coded, without loss: ``"ans"`` by how often each code occurs (fast),
            ``"context"`` by what the row and the column of a code tell too (the smallest, slow),
            ``"huffman"`` as ``"ans"`` in whole bits, ``"zstd"``; None stores them plain.
            What would grow is stored plain. Needs the extra ``coding``.

    Raises:
        FileExistsError: There is a checkpoint at ``path``, or something else, which ``overwrite``
            does not replace.
        ModuleNotFoundError: ``coding`` needs a package that is not installed.
        TypeError: A leaf that has no form in a file; names its path.
        ValueError: ``coding`` is not known; or the fields of a compressed array do not fit each
            other; names its path.

    Example:
        >>> import tempfile, jax.numpy as jnp, jaxopt_compress as jc
        >>> small = jc.compress({"w": jnp.ones((4, 2))}, jc.quantize("int4"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     jc.save(f"{folder}/small", small)
        ...     jc.load(f"{folder}/small")["w"].codes.dtype
        dtype(int4)
    """
    root = resolve(path)
    if coding is not None:
        check_coding(coding)
    encoded = encode(tree)
    with _ONE_AT_A_TIME, _claimed_by_all(root, overwrite) as name:
        described: dict[str, Any] = {"version": VERSION, "checksums": {}}
        if coding is not None:
            described |= {"version": CODED_VERSION, "coding": coding, "chunks": {}}
        if encoded.arrays and coding is not None:
            parts, chunks = write_coded(root / name, encoded.arrays, coding)
            described |= {"checksums": parts, "chunks": chunks}
        elif encoded.arrays:
            described["checksums"] = write(root / name, encoded.arrays)
        if is_first():
            if encoded.arrays:
                flush(root / name)
            data = name if encoded.arrays else None
            document = {"format": NAME, "data": data, **described, "tree": encoded.node}
            replace_document(root, sealed(document))


@contextlib.contextmanager
def _claimed_by_all(root: Any, overwrite: bool) -> Iterator[str]:
    """As `claimed`, by the first process, in all that save together."""
    with contextlib.ExitStack() as stack:
        name = ""
        try:
            if is_first():
                name = stack.enter_context(claimed(root, overwrite))
        finally:
            # Those who wait are told, also if it was in vain.
            name = from_first(name)
        if not name:
            raise FileExistsError(f"{root} cannot be saved to; the first process says why")
        yield name
    wait_for_all("saved")


def load(path: str | os.PathLike[str], like: Any = None) -> Any:
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


def _load(root: Any, raw: bytes, like: Any) -> Any:
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


def load_shapes(path: str | os.PathLike[str]) -> Any:
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


def _read_arrays(root: Any, opened: _Opened, tree: PyTree, shardings: Any) -> Any:
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
