"""What the command may replace."""

import pathlib

from jaxopt_compress.storage import load_shapes

# What a checkpoint of `save` consists of.
_ENTRIES = {"_CHECKPOINT_METADATA", "arrays", "commit_success.txt", "structure"}


def check_output(out: pathlib.Path, source: pathlib.Path, overwrite: bool) -> None:
    """Refuses to write where something would be lost.

    Args:
        out: Where a checkpoint is to be written.
        source: What is read, which may not be replaced, nor hold or lie in ``out``.
        overwrite: Whether a checkpoint of `save` may be replaced.

    Raises:
        FileExistsError: Something is there that may not be replaced; says what would work.
    """
    target, read = out.expanduser().resolve(), source.expanduser().resolve()
    if target == read or target in read.parents or read in target.parents:
        raise FileExistsError(
            f"{out} is, holds or lies in what is read, {source}: choose another path"
        )
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{out} exists: choose another path, or pass --overwrite")
    names = {entry.name for entry in target.iterdir()} if target.is_dir() else {"a file"}
    other = sorted(names - _ENTRIES)
    try:
        if not other:
            load_shapes(target)
    except (OSError, ValueError) as error:
        raise FileExistsError(f"{out} is not replaced: {error}") from error
    if other:
        raise FileExistsError(
            f"{out} is not replaced, since it is no checkpoint of this command alone; there is "
            f"{', '.join(other[:4])}: choose another path"
        )
