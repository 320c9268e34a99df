"""One group of units."""

import dataclasses
import itertools

from jaxopt_compress.removal.units import Member


@dataclasses.dataclass(frozen=True, repr=False)
class Group:
    """Units that are alike: each takes the same number of indices of the same axes.

    Attributes:
        name: The path and the axis of one of its members.
        seeds: Per unit, where its removal starts in the coupling.
        members: The axes that shrink, in the order in which the function reads the parameters.
        inexact: Why removing units differs from masking them; empty where it does not.
        flops: The operations that one unit saves, of products and convolutions; of blocks the
            fewest.
        products: How many of these get smaller with it.
        layers: Whether units are layers of a scanned stack, or blocks, which a budget leaves alone.
        skippable: Whether removal is that of units that a softmax or `lax.top_k` skips.
        paths: For blocks: the parameters of each unit that go as a whole.
    """

    name: str
    seeds: list[tuple[int, ...]]
    members: list[Member]
    inexact: tuple[str, ...]
    flops: int
    products: int
    layers: bool = False
    paths: tuple[tuple[str, ...], ...] = ()
    skippable: bool = False

    def __len__(self) -> int:
        """How many units there are."""
        return len(self.seeds)

    def __repr__(self) -> str:
        return f"<Group {self.name!r} of {len(self)} units>"

    def describe(self) -> str:
        """Its lines in tables."""
        exact = "exact" if not self.inexact else f"not exact: {'; '.join(self.inexact)}"
        exact = exact.replace("not exact:", "exact if skipped:") if self.skippable else exact
        times = lambda m: f" x{m.indices.shape[1]}" if m.indices.shape[1] > 1 else ""
        rows = [f"    {m.path} axis {m.axis}{times(m)}" for m in self.members]
        rows += [f"    {i}: {_span(paths)}" for i, paths in enumerate(self.paths)]
        return "\n".join([f"{self.name}  {len(self)} units  {exact}", *rows])

    def others(self, path: str, axis: int) -> str:
        """The other axes that shrink, for messages."""
        found = [f"{m.path} axis {m.axis}" for m in self.members if m[:2] != (path, axis)]
        return ", ".join(found) or "nothing else"


def _span(paths: tuple[str, ...]) -> str:
    """Parameters by the folders that they have in common, one for each tree at the top."""
    tops = {path.split("/")[0]: [] for path in paths}
    for path in paths:
        tops[path.split("/")[0]].append(path)
    return f"{', '.join(map(_common, tops.values()))} ({len(paths)} parameters)"


def _common(paths: list[str]) -> str:
    levels = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    same = [level[0] for level in itertools.takewhile(lambda names: len({*names}) == 1, levels)]
    return paths[0] if len(paths) == 1 else "/".join([*same, "**"])
