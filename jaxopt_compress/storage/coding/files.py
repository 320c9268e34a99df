"""Coded arrays in files: one file per process that saves, one chunk after the other."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jaxopt_compress.storage import stored
from jaxopt_compress.storage.checksums import Box, Part, boxes_of, crc32, own_parts, parts_in
from jaxopt_compress.storage.coding import chunks
from jaxopt_compress.storage.coding.blocks import check_coding
from jaxopt_compress.storage.processes import Meeting, is_first
from jaxopt_compress.storage.schema import Chunk, Entry, encode
from jaxopt_compress.typing import Leaf, PyTree

# Numbers that processes tell each other about a part: its checksum, and those of a `Chunk`.
_TOLD = 5


def coded_bytes(tree: PyTree, coding: str = "ans") -> int:
    """Bytes that the arrays of a tree take in a file of ``save(path, tree, coding=coding)``.

    Codes them, one at a time, and writes nothing. The document beside the arrays, which says what
    the tree is made of, is not counted, as in `nbytes`.

    Args:
        tree: As in `save`; all arrays have to be held by this process.
        coding: As in `save`.

    Example:
        >>> import jax, jaxopt_compress as jc
        >>> w = jax.random.normal(jax.random.key(0), (512, 512))
        >>> small = jc.compress({"w": w}, jc.quantize("int4"))
        >>> jc.coded_bytes(small) < jc.nbytes(small)
        True
    """
    check_coding(coding)
    total = 0
    for entry, x in encode(tree).arrays.values():
        held = stored.stored(entry, x)
        for i, part in own_parts(held, boxes_of(held)):
            del i
            total += len(chunks.encode(part, _form(entry, part.shape), entry.packing, coding))
    return total


def write(
    folder: Any, arrays: dict[str, tuple[Entry, Leaf]], coding: str, meeting: Meeting
) -> tuple[dict[str, list[Part]], dict[str, list[Chunk]]]:
    """Writes arrays, given as ``(entry, array)`` by their keys, into a new folder, one at a time.

    Each process codes the shards that it holds, into a file of its own.

    Returns:
        The parts of each array, with checksums, and where each of them is.
    """
    if is_first():
        folder.mkdir()
    meeting.wait_for_all("folder")
    process, boxes, told = jax.process_index(), {}, []
    with (folder / _name(process)).open("wb") as file:
        for key, (entry, x) in arrays.items():
            held = stored.stored(entry, x)
            boxes[key] = boxes_of(held)
            own = np.zeros((len(boxes[key]), _TOLD), np.uint32)
            for i, part in own_parts(held, boxes[key]):
                raw = chunks.encode(part, _form(entry, part.shape), entry.packing, coding)
                file.write(raw)
                own[i] = (
                    crc32(part),
                    process,
                    len(raw) & 0xFFFFFFFF,
                    len(raw) >> 32,
                    zlib.crc32(raw),
                )
            told.append(own)
            del held
    rows = iter(meeting.sum_of_all(np.concatenate(told)).tolist())
    meeting.wait_for_all("written")
    ends: dict[int, int] = {}
    parts: dict[str, list[Part]] = {}
    places: dict[str, list[Chunk]] = {}
    for key, own in boxes.items():
        parts[key], places[key] = [], []
        for box in own:
            crc, owner, low, high, coded_crc = next(rows)
            size, start = high << 32 | low, ends.get(owner, 0)
            parts[key].append(Part(box[0], box[1], crc))
            places[key].append(Chunk(owner, start, size, coded_crc))
            ends[owner] = start + size
    return parts, places


def read(folder: Any, wanted: Sequence[tuple[Entry, Sharding | None]]) -> Iterator[Leaf]:
    """Reads coded arrays, given as ``(entry, sharding or None)``, one at a time.

    Yields:
        Their values, in order.

    Raises:
        CheckpointError: One is not what was saved; names it.
        ValueError: One cannot be held without 64-bit types.
    """
    stored.check_widths(wanted)
    for entry, sharding in wanted:
        if entry.key is None:
            x = np.zeros(entry.stored_shape, entry.stored_dtype)
        else:
            try:
                x = _stored_array(folder, entry, sharding)
            except (ValueError, OSError, OverflowError, MemoryError) as error:
                raise stored.damaged(folder, f"{entry.path!r}: {error}") from error
        yield jax.block_until_ready(stored.restored(entry, x, sharding))
        del x


def check_sizes(folder: Any, entries: Sequence[Entry]) -> None:
    """Compares the sizes of files with what the document says, before memory is taken.

    Args:
        folder: Where `write` has written.
        entries: All arrays of the checkpoint.

    Raises:
        CheckpointError: A file is missing, or of another size.
    """
    sizes: dict[int, int] = {}
    for entry in entries:
        for chunk in entry.chunks:
            sizes[chunk.file] = max(sizes.get(chunk.file, 0), chunk.start + chunk.size)
    for file, size in sizes.items():
        path = folder / _name(file)
        found = path.stat().length if path.exists() else None
        if found != size:
            raise stored.damaged(folder, f"{path.name} has {found} bytes, not {size}")


def _stored_array(folder: Any, entry: Entry, sharding: Any) -> jax.Array | np.ndarray:
    """The stored array: on its devices if each holds whole parts, else on the host."""
    if not stored.reads_shards(entry, sharding):
        return _box(folder, entry, ((0,) * len(entry.stored_shape), entry.stored_shape))
    indices = sharding.addressable_devices_indices_map(entry.stored_shape)
    held: dict[Box, np.ndarray] = {}
    shards = []
    for device, index in indices.items():
        box = stored.box_of(index, entry.stored_shape)
        if box not in held:
            # Copies of a part follow each other on most meshes; all parts are not kept.
            held = {box: _box(folder, entry, box)}
        shards.append(jax.device_put(held[box], device))
    return jax.make_array_from_single_device_arrays(entry.stored_shape, sharding, shards)


def _box(folder: Any, entry: Entry, box: Box) -> np.ndarray:
    """A box of a stored array, from the parts in it."""
    inside = [(entry.parts[i], entry.chunks[i], cut) for i, cut in parts_in(entry.parts, box)]
    if len(inside) == 1:
        return _part(folder, entry, *inside[0][:2])
    x = np.empty(box[1], entry.stored_dtype)
    for part, chunk, cut in inside:
        x[cut] = _part(folder, entry, part, chunk)
    return x


def _part(folder: Any, entry: Entry, part: Part, chunk: Chunk) -> np.ndarray:
    with (folder / _name(chunk.file)).open("rb") as file:
        file.seek(chunk.start)
        raw = file.read(chunk.size)
    if len(raw) != chunk.size or zlib.crc32(raw) != chunk.crc32:
        raise ValueError(
            f"its chunk of {chunk.size} bytes at {chunk.start} of {_name(chunk.file)} is not what "
            "was saved, by its checksum"
        )
    x = chunks.decode(raw, _form(entry, part.shape))
    if crc32(x) != part.crc32:
        raise ValueError("it was decoded to other entries than were saved, by their checksum")
    return x


def _form(entry: Entry, shape: tuple[int, ...]) -> chunks.Form:
    return chunks.Form(
        tuple(shape),
        entry.stored_dtype,
        entry.bits,
        entry.axis,
        stored.entries_shape(entry, tuple(shape)),
        entry.dtype.kind == "i" or entry.dtype.name in ("int1", "int2", "int4"),
    )


def _name(process: int) -> str:
    return f"chunks-{process}"
