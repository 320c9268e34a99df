"""The arrays of a checkpoint: packed, written and read by orbax, and checked."""

import gc
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from jaxopt_compress.storage.checksums import (
    Part,
    box_of,
    boxes_of,
    holds_whole_parts,
    own_sums,
    verify,
)
from jaxopt_compress.storage.folder import CheckpointError
from jaxopt_compress.storage.processes import Meeting, is_first
from jaxopt_compress.storage.schema import Entry
from jaxopt_compress.storage.templates import is_split
from jaxopt_compress.storage.words import from_words, to_words
from jaxopt_compress.typing import Leaf

# Small arrays are read together up to this many bytes, larger ones alone.
_TOGETHER = 2**24

Wanted = tuple[Entry, Sharding | None]


def _handler() -> Any:
    import orbax.checkpoint as ocp

    # The handler alone: the document says what is complete. The signals that orbax's composite
    # handler waits for are numbered by process, so that of two threads that save, one may wait for
    # the number of the other, for ever.
    # Uncompressed: codes do not shrink further, and sizes are what nbytes says.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def write(
    folder: Any, arrays: dict[str, tuple[Entry, Leaf]], meeting: Meeting
) -> dict[str, list[Part]]:
    """Writes arrays, given as ``(entry, array)`` by their keys, into a new folder.

    Each process writes the shards that it holds, and computes their checksums.

    Returns:
        The parts of each array, with checksums.
    """
    import orbax.checkpoint as ocp

    held = {key: stored(entry, x) for key, (entry, x) in arrays.items()}
    boxes = {key: boxes_of(x) for key, x in held.items()}
    sums = meeting.sum_of_all(np.concatenate([own_sums(x, boxes[key]) for key, x in held.items()]))
    if is_first():
        folder.mkdir()
    meeting.wait_for_all("folder")
    handler = _handler()
    handler.save(folder, args=ocp.args.PyTreeSave(held))
    meeting.wait_for_all("written")
    if is_first():
        handler.finalize(folder)
    handler.close()
    values = iter(sums.tolist())
    return {key: [Part(*box, next(values)) for box in own] for key, own in boxes.items()}


def read(folder: Any, wanted: Sequence[Wanted]) -> Iterator[Leaf]:
    """Reads arrays, given as ``(entry, sharding or None)``, a few at a time.

    Yields:
        Their values, in order.

    Raises:
        CheckpointError: One is not what was saved; names it.
        ValueError: One cannot be held without 64-bit types.
    """
    check_widths(wanted)
    handler = _handler()
    _check_stored(handler, folder, [entry for entry, _ in wanted if entry.key is not None])
    for batch in _batches(wanted):
        found = _restore(handler, folder, [pair for pair in batch if pair[0].key is not None])
        for entry, sharding in batch:
            if entry.key is None:
                x = np.zeros(entry.stored_shape, entry.stored_dtype)
            else:
                x = found.pop(entry.key)
                try:
                    verify(x, entry.parts)
                except ValueError as error:
                    raise damaged(folder, f"{entry.path!r}: {error}") from error
            # What is copied to a device holds its source until it is there.
            yield jax.block_until_ready(restored(entry, x, sharding))
            del x
        # Orbax leaves cycles behind that hold what it has read.
        gc.collect(1)


def check_widths(wanted: Sequence[Wanted]) -> None:
    """Raises ValueError if an array cannot be held without 64-bit types."""
    for entry, sharding in wanted:
        on_device = entry.kind in ("jax", "key") or sharding is not None
        if on_device and jax.dtypes.canonicalize_dtype(entry.dtype) != entry.dtype:
            raise ValueError(
                f"{entry.path!r} is an array of {entry.dtype}, which cannot be restored as such "
                "without 64-bit types: set jax_enable_x64"
            )


def damaged(where: str | os.PathLike[str], why: str | Exception) -> CheckpointError:
    """The error about a file or folder that is not what was saved."""
    # After that orbax says by what settings it has tried to read.
    why = str(why).split(" [tensorstore_spec=", 1)[0]
    return CheckpointError(f"the checkpoint {where} cannot be read and may be damaged: {why}")


def _check_stored(handler: Any, folder: Any, entries: Sequence[Entry]) -> None:
    """Compares names, shapes and dtypes of the file, before memory is taken for it."""
    if not entries:
        return
    try:
        found = handler.metadata(folder)
        found = dict(getattr(found, "tree", found))
    except Exception as error:
        raise damaged(folder, error) from error
    for entry in entries:
        x = found.get(entry.key)
        own = f"{entry.stored_dtype}{list(entry.stored_shape)}"
        other = "missing" if x is None else f"{np.dtype(x.dtype)}{list(x.shape)}"
        if own != other:
            raise damaged(folder, f"{entry.path!r}: array {entry.key} is {other}, not {own}")


def _batches(wanted: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    batch, size = [], 0
    for entry, sharding in wanted:
        own = math.prod(entry.stored_shape) * entry.stored_dtype.itemsize
        if batch and size + own > _TOGETHER:
            yield batch
            batch, size = [], 0
        batch.append((entry, sharding))
        size += own
    yield batch


def _restore(handler: Any, folder: Any, batch: list[Wanted]) -> dict[str | None, Leaf]:
    """Arrays as they were stored."""
    import orbax.checkpoint as ocp

    if not batch:
        return {}
    how = {entry.key: _restore_args(entry, sharding) for entry, sharding in batch}
    args = ocp.args.PyTreeRestore(
        item=dict.fromkeys(how, 0), restore_args=how, partial_restore=True
    )
    try:
        return handler.restore(folder, args=args)
    except Exception as error:
        if len(batch) == 1:
            raise damaged(folder, f"{batch[0][0].path!r}: {error}") from error
        # Which of them it is, is known by reading them alone.
        alone = [_restore(handler, folder, [pair]) for pair in batch]
        return {key: x for found in alone for key, x in found.items()}


def _restore_args(entry: Entry, sharding: Sharding | None) -> Any:
    """How orbax reads an array: onto devices that hold whole words and parts, else to the host."""
    import orbax.checkpoint as ocp

    if not reads_shards(entry, sharding):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding)


def reads_shards(entry: Entry, sharding: Any) -> bool:
    """Whether an array is split so that each device holds whole words, and whole parts."""
    if not is_split(sharding):
        return False
    if entry.bits not in (None, 8):
        shard = sharding.shard_shape(entry.shape)
        if entry.axis is None or shard[entry.axis] % 8:
            return False
    indices = sharding.addressable_devices_indices_map(entry.stored_shape).values()
    boxes = {box_of(index, entry.stored_shape) for index in indices}
    return holds_whole_parts(boxes, entry.parts)


def stored(entry: Entry, x: Leaf) -> Leaf:
    """The array that is written for an entry."""
    if isinstance(x, Copied):
        return x.stored
    if not isinstance(x, jax.Array):
        # A scalar becomes an array of rank 0, and the bytes get the order of this machine.
        x = np.asarray(x, entry.dtype)
    bits = entry.bits
    if bits is None:
        return x
    pack = lambda part: to_words(part, bits, entry.axis)
    if is_split(getattr(x, "sharding", None)) and (bits == 8 or entry.axis is not None):
        return _by_shard(pack, x, entry.stored_shape, x.sharding)
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        # No shard holds whole words of it.
        x = multihost_utils.process_allgather(x, tiled=True)
    return pack(np.asarray(x))


class Copied(NamedTuple):
    """What `stored` has made: split over the memories of hosts as it was over devices, or whole."""

    stored: Leaf


def copied(entry: Entry, x: Leaf) -> Copied:
    """A copy that `stored` takes in the place of ``x``. All processes have to be here."""
    held = stored(entry, x)
    if is_split(getattr(held, "sharding", None)):
        # Words and floats, so every backend can move them; codes narrower than a byte it might not.
        there = held.sharding.with_memory_kind("pinned_host")
        return Copied(jax.block_until_ready(jax.device_put(held, there)))
    return Copied(np.array(held))


def restored(entry: Entry, stored: Leaf, sharding: Any) -> Leaf:
    """The array of an entry from what was written."""
    bits, axis = entry.bits, entry.axis
    if bits is not None:

        def unpack(part: np.ndarray) -> np.ndarray:
            return from_words(part, bits, axis, entries_shape(entry, part.shape), entry.dtype)

        if isinstance(stored, jax.Array):
            stored = _by_shard(unpack, stored, entry.shape, sharding)
        else:
            stored = unpack(stored)
    return placed(entry, stored, sharding)


def entries_shape(entry: Entry, stored: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the entries of a stored part."""
    bits, axis = entry.bits, entry.axis
    if bits is None or bits == 8:
        return stored
    if axis is None:
        return entry.shape
    return tuple(n * 8 // bits if d - len(stored) == axis else n for d, n in enumerate(stored))


def placed(entry: Entry, x: Leaf, sharding: Sharding | None) -> Leaf:
    """An array of an entry's shape and dtype as what it was, on ``sharding`` if there is one."""
    if entry.kind == "scalar":
        return x[()]
    if entry.kind == "numpy" and sharding is None:
        return x
    if sharding is None:
        # jnp.asarray would copy an array of NumPy once more before it goes to the device.
        x = jax.device_put(x)
    elif not isinstance(x, jax.Array):
        host = x
        x = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    return jax.random.wrap_key_data(x, impl=entry.impl) if entry.kind == "key" else x


def _by_shard(
    fn: Callable[[np.ndarray], np.ndarray], x: jax.Array, shape: tuple[int, ...], sharding: Sharding
) -> jax.Array:
    """Maps ``fn`` over the shards of ``x``, on the host, one after the other."""
    parts = [jax.device_put(fn(np.asarray(s.data)), s.device) for s in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)
