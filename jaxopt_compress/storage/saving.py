"""Saving trees that hold compressed arrays through orbax, at once or while training goes on."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jaxopt_compress.storage.coding import check_coding
from jaxopt_compress.storage.coding import write as write_coded
from jaxopt_compress.storage.folder import (
    check_free,
    claimed,
    flush,
    replace_document,
    resolve,
    sealed,
)
from jaxopt_compress.storage.processes import Meeting, is_first
from jaxopt_compress.storage.schema import CODED_VERSION, NAME, VERSION, Encoded, encode
from jaxopt_compress.storage.stored import copied, write
from jaxopt_compress.typing import PyTree


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
    root, encoded = _checked(path, tree, coding)
    _write(root, encoded, overwrite, coding, Meeting())


def save_async(
    path: str | os.PathLike[str],
    tree: PyTree,
    overwrite: bool = False,
    *,
    coding: str | None = None,
) -> Future[None]:
    """`save` in a thread, while the program goes on.

    Arrays are copied to the host before it returns, so they may be donated or deleted afterwards.
    The host holds the copy until the checkpoint is complete. Saves of one process, of both kinds,
    follow each other in the order of their calls; several processes have to call them in the same
    order.

    Args:
        path: As in `save`.
        tree: As in `save`.
        overwrite: As in `save`.
        coding: As in `save`.

    Returns:
        A future. Its ``result()`` returns when the checkpoint is complete, and raises what has kept
        it from being so, which is a warning too. Call it before the program ends: an interpreter
        that shuts down refuses new threads, also those that orbax needs.

    Raises:
        FileExistsError, ModuleNotFoundError, TypeError, ValueError: As `save`, at once where they
            are known from the arguments.

    Example:
        >>> import tempfile, jax.numpy as jnp, jaxopt_compress as jc
        >>> small = jc.compress({"w": jnp.ones((4, 2))}, jc.quantize("int4"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saving = jc.save_async(f"{folder}/small", small)
        ...     saving.result()  # after the next steps of training
        ...     jc.load(f"{folder}/small")["w"].codes.dtype
        dtype(int4)
    """
    root, encoded = _checked(path, tree, coding)
    check_free(root, overwrite)
    copies = {key: (entry, copied(entry, x)) for key, (entry, x) in encoded.arrays.items()}
    executor = ThreadPoolExecutor(1, thread_name_prefix="jaxopt_compress-save")
    meeting = Meeting()
    try:
        saving = executor.submit(
            _write, root, encoded._replace(arrays=copies), overwrite, coding, meeting
        )
    except BaseException:
        meeting.leave()
        raise
    executor.shutdown(wait=False)
    saving.add_done_callback(lambda saving: _ended(saving, root, meeting))
    return saving


def _ended(saving: Future[None], root: Any, meeting: Meeting) -> None:
    """Gives the turn on, and says a failure also where nobody asks for the result."""
    if saving.cancelled():
        # Before its thread came to it.
        meeting.leave()
    elif (error := saving.exception()) is not None:
        text = f"the checkpoint {root} was not saved: {type(error).__name__}: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def _checked(path: str | os.PathLike[str], tree: PyTree, coding: str | None) -> tuple[Any, Encoded]:
    """The absolute path and the described tree, as far as errors are known at once."""
    root = resolve(path)
    if coding is not None:
        check_coding(coding)
    return root, encode(tree)


def _write(
    root: Any, encoded: Encoded, overwrite: bool, coding: str | None, meeting: Meeting
) -> None:
    described: dict[str, Any] = {"version": VERSION, "checksums": {}}
    if coding is not None:
        described |= {"version": CODED_VERSION, "coding": coding, "chunks": {}}
    with meeting, _claimed_by_all(root, overwrite, meeting) as name:
        if encoded.arrays and coding is not None:
            parts, chunks = write_coded(root / name, encoded.arrays, coding, meeting)
            described |= {"checksums": parts, "chunks": chunks}
        elif encoded.arrays:
            described["checksums"] = write(root / name, encoded.arrays, meeting)
        if is_first():
            if encoded.arrays:
                flush(root / name)
            data = name if encoded.arrays else None
            document = {"format": NAME, "data": data, **described, "tree": encoded.node}
            replace_document(root, sealed(document))


@contextlib.contextmanager
def _claimed_by_all(root: Any, overwrite: bool, meeting: Meeting) -> Iterator[str]:
    """As `claimed`, by the first process, in all that save together."""
    with contextlib.ExitStack() as stack:
        name = ""
        try:
            if is_first():
                name = stack.enter_context(claimed(root, overwrite))
        finally:
            # Those who wait are told, also if it was in vain.
            name = meeting.from_first(name)
        if not name:
            raise FileExistsError(f"{root} cannot be saved to; the first process says why")
        yield name
