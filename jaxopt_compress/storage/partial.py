"""Finished leaves of a long job, kept until the whole is written, so that it can be resumed."""

import hashlib
import json
import pathlib
import shutil
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

from jaxopt_compress.storage.folder import CheckpointError
from jaxopt_compress.storage.loading import load
from jaxopt_compress.storage.saving import save
from jaxopt_compress.typing import Leaf

_JOB = "job.json"


class Partial:
    """A folder beside the result with one small checkpoint for each finished leaf.

    Leaves of another job, another input or other settings, are never taken for those of this one.
    """

    def __init__(self, folder: pathlib.Path, job: Mapping[str, object]):
        """Opens the folder, or makes it.

        Args:
            folder: It belongs to this class alone.
            job: What the leaves depend on, for JSON.

        Raises:
            FileExistsError: There is something else at ``folder``, or leaves of another job.
        """
        self.folder = folder
        text = json.dumps(job, sort_keys=True)
        file = folder / _JOB
        if folder.exists() and not file.is_file():
            raise FileExistsError(f"{folder} exists, and is nothing that was left unfinished")
        if file.is_file() and file.read_text() != text:
            raise FileExistsError(
                f"{folder} holds leaves of another checkpoint, recipe or layout: remove it, or run "
                "that command to its end"
            )
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def get(self, path: str) -> tuple[Leaf, dict[str, Any]] | None:
        """A finished leaf and its row of the report; None if it has to be done."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = load(self._place(path))
        except (FileNotFoundError, CheckpointError):
            return None
        return found["leaf"], json.loads(found["row"])

    def put(self, path: str, leaf: Leaf, row: Mapping[str, object]) -> None:
        """Keeps a finished leaf."""
        save(self._place(path), {"leaf": leaf, "row": json.dumps(row)}, overwrite=True)

    def remove(self) -> None:
        """Once the whole is written."""
        shutil.rmtree(self.folder)

    def _place(self, path: str) -> pathlib.Path:
        return self.folder / hashlib.sha256(path.encode()).hexdigest()[:32]


def describe_files(root: pathlib.Path) -> int:
    """A number that differs if any file has another name, size or time."""
    files = sorted(root.rglob("*")) if root.is_dir() else [root]
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return zlib.crc32(json.dumps(stats).encode())
