"""One group of units."""

import dataclasses

from jaxopt_compress.removal.units import Member


@dataclasses.dataclass(frozen=True, repr=False)
class Group:
    """Units that are alike: each takes the same number of indices of the same axes.

    Attributes:
        name: The path and the axis of one of its members.
        seeds: Per unit, where its removal starts in the coupling.
        members: The axes that shrink, in the order in which the function reads the parameters.
        inexact: Why removing units differs from masking them; empty where it does not.
        flops: The operations that one unit saves, of products and convolutions.
        products: How many of these get smaller with it.
        layers: Whether units are layers of a scanned stack, which a budget leaves alone.
    """

    name: str
    seeds: list[tuple[int, ...]]
    members: list[Member]
    inexact: tuple[str, ...]
    flops: int
    products: int
    layers: bool = False

    def __len__(self) -> int:
        """How many units there are."""
        return len(self.seeds)

    def __repr__(self) -> str:
        return f"<Group {self.name!r} of {len(self)} units>"

    def describe(self) -> str:
        """Its lines in tables."""
        exact = "exact" if not self.inexact else f"not exact: {'; '.join(self.inexact)}"
        times = lambda m: f" x{m.indices.shape[1]}" if m.indices.shape[1] > 1 else ""
        rows = [f"    {m.path} axis {m.axis}{times(m)}" for m in self.members]
        return "\n".join([f"{self.name}  {len(self)} units  {exact}", *rows])

    def others(self, path: str, axis: int) -> str:
        """The other axes that shrink, for messages."""
        found = [f"{m.path} axis {m.axis}" for m in self.members if m[:2] != (path, axis)]
        return ", ".join(found) or "nothing else"
