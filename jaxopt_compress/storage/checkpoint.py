"""Saving and restoring trees that hold compressed arrays, through orbax."""

import os
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.storage.schema import NAME, VERSION, Decoded, Entry, decode, encode
from jaxopt_compress.storage.templates import is_split, match
from jaxopt_compress.storage.words import from_words, to_words
from jaxopt_compress.tree import map_named

# The two items of a checkpoint: what orbax stores as arrays, and how they make up the tree.
ARRAYS, STRUCTURE = "arrays", "structure"


def save(path: str | os.PathLike[str], tree: Any, overwrite: bool = False) -> None:
    """Saves a tree with compressed arrays, so that `load` needs no template.

    Codes are packed to their true width, so that the files take `nbytes` of the tree and some KB. A
    checkpoint appears under its name only when it is complete. Sharded arrays are packed shard by
    shard and written by the processes that hold them.

    Args:
        path: A new directory, local or remote as orbax understands it.
        tree: Arrays of JAX or NumPy, compressed arrays, numbers, strings and None in dicts, lists
            and tuples, with string or integer keys. Other pytree nodes (named tuples,
            `flax.nnx.State`, dataclasses) are saved as dicts of their children.
        overwrite: Whether an existing directory is removed first.

    Raises:
        FileExistsError: There is something at ``path``.
        TypeError: A leaf that has no form in a file; names its path.

    Example:
        >>> import tempfile, jax.numpy as jnp, jaxopt_compress as jc
        >>> small = jc.compress({"w": jnp.ones((4, 2))}, jc.quantize("int4"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     jc.save(f"{folder}/small", small)
        ...     jc.load(f"{folder}/small")["w"].codes.dtype
        dtype(int4)
    """
    # Imported late: who saves nothing need not wait for it.
    import orbax.checkpoint as ocp

    root = _resolve(path)
    encoded = encode(tree)
    if root.exists() and not overwrite:
        raise FileExistsError(f"{root} exists: choose another path, or pass overwrite=True")
    arrays = {key: _stored(entry, x) for key, (entry, x) in encoded.arrays.items()}
    document = {"format": NAME, "version": VERSION, "tree": encoded.node}
    items: dict[str, Any] = {STRUCTURE: ocp.args.JsonSave(document)}
    if arrays:
        items[ARRAYS] = ocp.args.PyTreeSave(arrays)
    with _checkpointer() as checkpointer:
        checkpointer.save(root, ocp.args.Composite(**items), force=overwrite)


def load(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Restores what `save` has written.

    Args:
        path: The directory.
        like: A tree of any containers whose leaves have the same paths: the result has its
            structure, and its shardings where its leaves have any (arrays, or
            `jax.ShapeDtypeStruct` with a sharding; that of a dense leaf also places a compressed
            array, as in `shard`). Without it, dicts, lists and tuples come back as they were, and
            other containers as dicts.

    Returns:
        The tree: equal leaves of the same types, on the default device without shardings.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: It is no checkpoint of this package, is of a newer version, or is damaged; or
            ``like`` does not fit.
    """
    decoded = _read_structure(path)
    if like is None:
        if decoded.converted:
            warnings.warn(
                f"{', '.join(sorted(set(decoded.converted)))} in {os.fspath(path)} come back as "
                "dicts; pass like= with a tree of the wanted structure",
                stacklevel=2,
            )
        shardings = jax.tree.map(lambda _: None, decoded.tree)
        return _read_arrays(path, decoded.tree, shardings)
    stored, placed = match(decoded.tree, like)
    values = _read_arrays(path, stored, placed)
    return map_named(lambda name, _: values[name], like)


def load_shapes(path: str | os.PathLike[str]) -> Any:
    """The tree of a checkpoint, with a `jax.ShapeDtypeStruct` in the place of each array.

    Reads no data. Raises as `load`.
    """
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, Entry) else x
    return jax.tree.map(abstract, _read_structure(path).tree)


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether there is a checkpoint of this package at ``path``, of whatever version."""
    root = _resolve(path)
    return (root / STRUCTURE).is_dir()


def _resolve(path: str | os.PathLike[str]) -> Any:
    from etils import epath

    # Remote paths (gs://) are absolute as they are.
    return epath.Path(os.fspath(path)).expanduser().resolve()


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    # Uncompressed: codes do not shrink further, and sizes are what nbytes says.
    handlers = {
        ARRAYS: ocp.PyTreeCheckpointHandler(use_compression=False),
        STRUCTURE: ocp.JsonCheckpointHandler(),
    }
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def _read_structure(path: str | os.PathLike[str]) -> Decoded:
    import orbax.checkpoint as ocp

    root = _resolve(path)
    if not root.exists():
        raise FileNotFoundError(f"there is no checkpoint at {root}")
    if not is_checkpoint(root):
        foreign = any((root / name).exists() for name in ("_CHECKPOINT_METADATA", "_METADATA"))
        what = "a checkpoint of another program; restore it by orbax" if foreign else "none"
        raise ValueError(f"{root} is no checkpoint of jaxopt_compress.save: it is {what}")
    try:
        with _checkpointer() as checkpointer:
            items = ocp.args.Composite(**{STRUCTURE: ocp.args.JsonRestore()})
            document = checkpointer.restore(root, items)[STRUCTURE]
    except Exception as error:
        raise _damaged(root, error) from error
    if not isinstance(document, Mapping) or document.get("format") != NAME:
        raise ValueError(
            f"{root} is no checkpoint of jaxopt_compress.save: its structure names another format"
        )
    version = document.get("version")
    if not isinstance(version, int):
        raise _damaged(root, f"version {version!r}")
    if version > VERSION:
        raise ValueError(
            f"{root} has version {version} of the format and this package reads up to {VERSION}: "
            "install a newer jaxopt-compress"
        )
    if version < VERSION:
        raise ValueError(
            f"{root} has version {version} of the format, from before it was settled, and this "
            f"package reads version {VERSION}: save it anew"
        )
    try:
        return decode(document["tree"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _damaged(root, error) from error


def _damaged(root: Any, why: Any) -> ValueError:
    return ValueError(f"the checkpoint {root} cannot be read and may be damaged: {why}")


def _read_arrays(path: str | os.PathLike[str], tree: Any, shardings: Any) -> Any:
    """The tree with arrays in the place of entries, on ``shardings`` where these are not None."""
    import orbax.checkpoint as ocp

    root = _resolve(path)
    leaves, treedef = jax.tree.flatten(tree)
    pairs = list(zip(leaves, treedef.flatten_up_to(shardings), strict=True))
    args = {
        x.key: _restore_args(x, s) for x, s in pairs if isinstance(x, Entry) and x.key is not None
    }
    arrays = {}
    if args:
        try:
            with _checkpointer() as checkpointer:
                restore = ocp.args.PyTreeRestore(restore_args=args)
                items = ocp.args.Composite(**{ARRAYS: restore})
                arrays = checkpointer.restore(root, items)[ARRAYS]
        except Exception as error:
            raise _damaged(root, error) from error
    values = []
    for x, sharding in pairs:
        if isinstance(x, Entry):
            array = np.zeros(x.stored_shape, x.stored_dtype)
            array = array if x.key is None else arrays.pop(x.key)
            if (array.shape, array.dtype) != (x.stored_shape, x.stored_dtype):
                found = f"{array.dtype}{list(array.shape)}"
                raise _damaged(
                    root, f"array {x.key} is {found}, not {x.stored_dtype}{list(x.stored_shape)}"
                )
            x = _restored(x, array, sharding)
        values.append(x)
    return jax.tree.unflatten(treedef, values)


def _stored(entry: Entry, x: Any) -> Any:
    """The array that is written for an entry."""
    if not isinstance(x, jax.Array):
        # A scalar becomes an array of rank 0, and the bytes get the order of this machine.
        x = np.asarray(x, entry.dtype)
    bits = entry.bits
    if bits is None:
        return x
    pack = lambda part: to_words(part, bits, entry.axis)
    if is_split(getattr(x, "sharding", None)) and (bits == 8 or entry.axis is not None):
        return _by_shard(pack, x, entry.stored_shape, x.sharding)
    return pack(np.asarray(x))


def _restored(entry: Entry, stored: Any, sharding: Any) -> Any:
    """The array of an entry from what was written."""
    bits, axis = entry.bits, entry.axis
    if bits is not None:

        def unpack(part: np.ndarray) -> np.ndarray:
            shape = entry.shape
            if bits == 8 or axis is not None:
                longer = lambda d, n: n * 8 // bits if d - part.ndim == axis else n
                shape = tuple(longer(d, n) for d, n in enumerate(part.shape))
            return from_words(part, bits, axis, shape, entry.dtype)

        if isinstance(stored, jax.Array):
            stored = _by_shard(unpack, stored, entry.shape, sharding)
        else:
            stored = unpack(stored)
    if entry.kind == "scalar":
        return stored[()]
    if entry.kind == "numpy" and sharding is None:
        return stored
    if sharding is None:
        stored = jnp.asarray(stored)
    elif not isinstance(stored, jax.Array):
        stored = jax.device_put(stored, sharding)
    if stored.dtype != entry.dtype:
        raise ValueError(
            f"an array of {entry.dtype} cannot be restored as such without 64-bit types: set "
            "jax_enable_x64"
        )
    return jax.random.wrap_key_data(stored, impl=entry.impl) if entry.kind == "key" else stored


def _restore_args(entry: Entry, sharding: Any) -> Any:
    """How orbax reads a stored array: onto devices if each holds whole words, else to the host."""
    import orbax.checkpoint as ocp

    whole = is_split(sharding)
    if whole and entry.bits not in (None, 8):
        shard = sharding.shard_shape(entry.shape)
        whole = entry.axis is not None and shard[entry.axis] % 8 == 0
    if not whole:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding)


def _by_shard(fn: Any, x: jax.Array, shape: tuple[int, ...], sharding: Any) -> jax.Array:
    """Maps ``fn`` over the shards of ``x``, on the host, one after the other."""
    parts = [jax.device_put(fn(np.asarray(s.data)), s.device) for s in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)
