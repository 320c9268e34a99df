"""The decisions of one run: in memory, and in a folder from which a later run goes on."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import SparseArray
from jaxopt_compress.arrays.base import stored_bytes
from jaxopt_compress.lift import Statistics
from jaxopt_compress.lift.lockstep.values import Index
from jaxopt_compress.post_training.steps import open_folder
from jaxopt_compress.storage import load, save
from jaxopt_compress.typing import Leaf


class Decided:
    """What has been decided, in order.

    Args:
        folder: Where decisions are kept, or None.
        fingerprint: What the run depends on; of no use without a folder.
        chosen: The paths of the parameters to decide.
        progress: Whether each decision is printed.

    Raises:
        ValueError: The folder belongs to another run.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        fingerprint: str,
        chosen: Sequence[str],
        progress: bool,
    ) -> None:
        self._found: dict[str, dict[Index, Leaf]] = {path: {} for path in chosen}
        self._stats: dict[str, dict[Index, list[Statistics]]] = {path: {} for path in chosen}
        self._progress, self._folder, self._count = progress, None, 0
        if folder is None:
            return
        self._folder = open_folder(folder, fingerprint)

    def once(
        self,
        path: str,
        index: Index,
        stats: Callable[[], list[Statistics]],
        decide: Callable[[list[Statistics]], Leaf],
    ) -> Leaf:
        """The decision for one parameter or entry, from the folder if it is there."""
        place = None if self._folder is None else self._folder / f"{self._count:06d}"
        self._count += 1
        name = {"path": path, "index": list(index)}
        leaf = None if place is None else _read(place, name)
        # Entries may turn out to need a decision together: a run that goes on needs theirs too.
        seen = stats() if leaf is None or index else []
        if index:
            self._stats[path][index] = jax.device_get(seen)
        if leaf is None:
            leaf = decide(seen)
            if place is not None:
                _keep(place, name, leaf)
        self._found[path][index] = leaf
        self._say(path, index, leaf)
        return leaf

    def of(self, path: str) -> dict[Index, Leaf]:
        """Index -> leaf, of one parameter."""
        return self._found[path]

    def statistics(self, path: str, shape: tuple[int, ...]) -> list[Statistics]:
        """The statistics of all entries of one parameter, where all of them were measured."""
        found = self._stats[path]
        stacked = stack_entries(dict(found.items()), shape)
        return stacked if isinstance(stacked, list) else []

    def _say(self, path: str, index: Index, leaf: Leaf) -> None:
        if not self._progress:
            return
        place = f"{path}[{', '.join(map(str, index))}]" if index else path
        bits = 8 * stored_bytes(leaf) / max(leaf.size, 1)
        done = sum(bool(x) for x in self._found.values())
        print(
            f"[{done}/{len(self._found)}] {place}: {type(leaf).__name__}, {bits:.3g} bits per "
            "weight",
            file=sys.stderr,
            flush=True,
        )


def stack_entries(found: Mapping[Index, Leaf], shape: tuple[int, ...]) -> Leaf:
    """The decisions about the entries of a stack as one; None if they do not fit together.

    Args:
        found: Index -> a tree whose arrays have the stack axes with size 1; or ``()`` -> the whole.
        shape: The shape of the parameter.
    """
    if not found:
        return None
    depth = len(next(iter(found)))
    if depth == 0:
        return found[()]
    lead = shape[:depth]
    if set(found) != set(np.ndindex(*lead)):
        return None
    entries = [found[index] for index in np.ndindex(*lead)]
    entries = _filled_up(entries)
    if not _alike(entries):
        return None
    join = lambda *xs: jnp.concatenate(xs).reshape(*lead, *xs[0].shape[depth:])
    return jax.tree.map(join, *entries)


def _filled_up(entries: Sequence[Leaf]) -> list[Leaf]:
    """Sparse rows of equal capacity: rows with fewer values end in zeros that nothing reads."""
    is_sparse = lambda x: isinstance(x, SparseArray)
    trees = [jax.tree.structure(x, is_leaf=is_sparse) for x in entries]
    if any(t != trees[0] for t in trees):
        return list(entries)
    filled = []
    for column in zip(*(jax.tree.leaves(x, is_leaf=is_sparse) for x in entries), strict=True):
        if is_sparse(column[0]) and column[0].pattern is None:
            most = max(x.values.shape[-1] for x in column)
            column = [x.replace(values=_ended(x.values, most)) for x in column]
        filled.append(column)
    return [jax.tree.unflatten(trees[0], own) for own in zip(*filled, strict=True)]


def _ended(values: jax.Array, length: int) -> jax.Array:
    widths = [(0, 0)] * (values.ndim - 1) + [(0, length - values.shape[-1])]
    return jnp.pad(values, widths)


def _alike(entries: Sequence[Leaf]) -> bool:
    kind = lambda x: jax.tree.map(lambda a: (tuple(a.shape), a.dtype), x)
    first = jax.tree.structure(entries[0])
    same = all(jax.tree.structure(x) == first for x in entries)
    return same and all(kind(x) == kind(entries[0]) for x in entries)


def _keep(place: Path, name: Mapping[str, object], leaf: Leaf) -> None:
    """Saves one decision; a killed process leaves none or a whole one."""
    beside = place.with_name(f"{place.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    save(beside / "leaf", {"leaf": leaf})
    (beside / "name.json").write_text(json.dumps(dict(name)))
    os.replace(beside, place)


def _read(place: Path, name: Mapping[str, object]) -> Leaf:
    """A saved decision, or None.

    Raises:
        ValueError: It is that of another parameter.
    """
    if not place.exists():
        return None
    kept = json.loads((place / "name.json").read_text())
    if kept != dict(name):
        raise ValueError(
            f"{place} holds the decision of {kept['path']!r}, and {name['path']!r} is met here: "
            "the folder belongs to another function; pass another folder"
        )
    return load(place / "leaf")["leaf"]
