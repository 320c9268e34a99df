"""The folder of a checkpoint: what in it counts, and how another version takes its place.

A folder holds one document, and the arrays of it in a subfolder of an unused name, which the
document names. To overwrite is to write another subfolder beside the first and then to replace
the document, which file systems do in one step. `docs/checkpoint_format.md` has the reasons.
"""

import contextlib
import errno
import json
import os
import secrets
import zlib
from collections.abc import Iterator
from typing import Any

try:
    import fcntl
except ImportError:  # Not on Windows.
    fcntl = None

DOCUMENT, LOCK, DATA = "checkpoint.jsonl", "lock", "data-"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, of another version or program; names the file and the leaf."""


def resolve(path: str | os.PathLike[str]) -> Any:
    """An absolute path of a kind that may also be remote."""
    # Imported late: who saves nothing need not wait for it.
    from etils import epath

    found = epath.Path(os.fspath(path)).expanduser()
    # Remote paths (gs://) are absolute as they are, and would be taken for local ones.
    return found if "://" in os.fspath(found) else found.resolve()


def sealed(document: Any) -> bytes:
    """A document and its checksum: two lines of JSON."""
    line = json.dumps(document, allow_nan=False).encode()
    return b"%s\n%s\n" % (line, json.dumps({"crc32": zlib.crc32(line)}).encode())


def unsealed(raw: bytes) -> Any:
    """Inverts `sealed`.

    Raises:
        ValueError: Any bit differs from what was written.
    """
    line = raw.split(b"\n", 1)[0]
    if raw != b"%s\n%s\n" % (line, json.dumps({"crc32": zlib.crc32(line)}).encode()):
        raise ValueError("its checksum is another")
    return json.loads(line, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a name twice among {', '.join(name for name, _ in pairs)}")
    return found


def read_raw(root: Any) -> bytes:
    """The document as it was written.

    Raises:
        FileNotFoundError: There is nothing at ``root``.
        CheckpointError: There is no checkpoint of this package.
    """
    if not root.exists():
        raise FileNotFoundError(f"there is no checkpoint at {root}")
    try:
        return (root / DOCUMENT).read_bytes()
    except OSError as error:
        if (root / LOCK).exists():
            what = f"its {DOCUMENT} is lost, or it was never saved to its end"
        elif (root / "_CHECKPOINT_METADATA").exists() or (root / "_METADATA").exists():
            what = "it is a checkpoint of another program; restore it by orbax"
        else:
            what = f"it has no {DOCUMENT}"
        raise CheckpointError(f"{root} is no checkpoint of jaxopt_compress.save: {what}") from error


@contextlib.contextmanager
def claimed(root: Any, overwrite: bool) -> Iterator[str]:
    """The name of a new subfolder for data, while nobody else saves to ``root``.

    What killed savers have left behind is removed, before and after: under the lock, whatever the
    document does not name belongs to nobody.

    Raises:
        FileExistsError: There is something else at ``root``, or a checkpoint without ``overwrite``.
    """
    check_free(root, overwrite)
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root) as alone:
        check_free(root, overwrite)
        if alone:
            _remove_unused(root)
        try:
            yield f"{DATA}{secrets.token_hex(8)}"
        finally:
            if alone:
                _remove_unused(root)


def check_free(root: Any, overwrite: bool) -> None:
    """Raises FileExistsError if a checkpoint may not be saved to ``root``."""
    if not root.exists():
        return
    if not root.is_dir():
        raise FileExistsError(f"{root} is a file: choose another path")
    if (root / DOCUMENT).exists():
        if not overwrite:
            raise FileExistsError(f"{root} exists: choose another path, or pass overwrite=True")
        return
    others = sorted(file.name for file in root.iterdir() if not _is_own(file.name))
    if others:
        raise FileExistsError(
            f"{root} exists and is no checkpoint of this package, but holds {others[0]!r}: choose "
            "another path; overwrite=True replaces checkpoints only"
        )


def replace_document(root: Any, raw: bytes) -> None:
    """Makes ``raw`` the document, in one step."""
    if not _is_local(root):
        # A store of objects replaces an object in one step.
        (root / DOCUMENT).write_bytes(raw)
        return
    beside = f"{root / DOCUMENT}.{secrets.token_hex(8)}"
    with open(beside, "wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, root / DOCUMENT)
    _sync(os.fspath(root))


def flush(folder: Any) -> None:
    """Returns when the files of a local folder would outlive a failure of power."""
    if _is_local(folder):
        for parent, _, files in os.walk(folder):
            for name in (*files, ""):
                _sync(os.path.join(parent, name))


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems know no such request for folders.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _is_local(root: Any) -> bool:
    return os.name == "posix" and "://" not in os.fspath(root)


@contextlib.contextmanager
def _locked(root: Any) -> Iterator[bool]:
    """Waits until nobody else saves to ``root``; false where there are no locks.

    The system opens the lock of a process that ends, however it ends.
    """
    if fcntl is None or not _is_local(root):
        yield False
        return
    descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            alone = True
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            alone = False
        yield alone
    finally:
        os.close(descriptor)


def is_data(name: Any) -> bool:
    """Whether it is the name of a subfolder of data."""
    return isinstance(name, str) and name.startswith(DATA) and name.removeprefix(DATA).isalnum()


def _is_own(name: str) -> bool:
    return name == LOCK or name.startswith((DOCUMENT, DATA))


def _remove_unused(root: Any) -> None:
    """Removes what is ours but for the lock, the document and the data that it names."""
    kept = {LOCK, DOCUMENT}
    if (root / DOCUMENT).exists():
        try:
            kept.add(unsealed((root / DOCUMENT).read_bytes())["data"])
        except (ValueError, KeyError, TypeError):
            # A document that nobody can read: its data may be all that is left.
            return
    for child in root.iterdir():
        if _is_own(child.name) and child.name not in kept:
            # What cannot be removed now is removed by a later save.
            with contextlib.suppress(OSError):
                child.rmtree() if child.is_dir() else child.unlink()
