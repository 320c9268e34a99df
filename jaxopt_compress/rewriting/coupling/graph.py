"""Which indices of a function's values have to go together.

Each axis of each value carries one atom per index, an integer. Operations that only move entries
(transposes, slices, concatenations) move atoms along; operations that combine entries of equal
index tie their atoms. What is tied is removed together.
"""

import math
from typing import NamedTuple

import numpy as np

Axis = np.ndarray  # one atom per index
Axes = tuple[Axis, ...]


class Product(NamedTuple):
    """An axis whose indices are pairs, or longer tuples, of indices of factors, row-major.

    An index of the whole is removed if and only if one of its factors' indices is.
    """

    whole: Axis
    factors: tuple[Axis, ...]


class Graph:
    """Atoms, and what the equations of a function say of them."""

    def __init__(self):
        self.size = 0
        self.ties: list[tuple[Axis, Axis]] = []
        self.protected: list[tuple[Axis, str]] = []
        self.products: list[Product] = []
        self._splits: dict[tuple[bytes, tuple[int, ...]], tuple[Axis, ...]] = {}
        self._joins: dict[tuple[bytes, ...], Axis] = {}
        self._tied: set[tuple[int, int]] = set()
        self._choices: dict[int, tuple[Axis, Axis]] = {}
        self._counts: dict[int, Axis] = {}

    def axis(self, length: int) -> Axis:
        """A new axis."""
        atoms = np.arange(self.size, self.size + length)
        self.size += length
        return atoms

    def axes(self, shape: tuple[int, ...]) -> Axes:
        """The new axes of a value."""
        return tuple(self.axis(n) for n in shape)

    def tie(self, a: Axis, b: Axis) -> None:
        """Equal indices of two axes of one length go together."""
        if a is b or (id(a), id(b)) in self._tied:
            return
        if len(a) != len(b):
            raise ValueError(f"axes of lengths {len(a)} and {len(b)} have no indices in common")
        self._tied.add((id(a), id(b)))
        self.ties.append((a, b))  # which also keeps the two alive, and their ids their own

    def chooses(self, axis: Axis, source: Axis) -> None:
        """A value with this very axis holds numbers of indices of a source."""
        self._choices[id(axis)] = (axis, source)

    def counts(self, axis: Axis) -> None:
        """A value with this very axis holds the numbers of its indices."""
        self._counts[id(axis)] = axis

    def compare(self, a: Axes, b: Axes) -> None:
        """Numbers of chosen indices are compared with all numbers, as in a one-hot encoding."""
        for left, right in ((a, b), (b, a)):
            sources = [self._choices[id(x)][1] for x in left if id(x) in self._choices]
            for source in sources:
                for x in right:
                    if id(x) in self._counts and len(x) == len(source):
                        self.tie(source, x)

    def tie_all(self, a: Axes, b: Axes) -> None:
        """Ties the axes of two values of one shape."""
        for x, y in zip(a, b, strict=True):
            self.tie(x, y)

    def protect(self, axes: Axes, why: str) -> None:
        """All indices stay."""
        self.protected += [(a, why) for a in axes if len(a)]

    def product(self, whole: Axis, factors: tuple[Axis, ...]) -> None:
        """The indices of an axis are tuples of indices of factors."""
        if math.prod(map(len, factors)) != len(whole):
            raise ValueError(f"{len(whole)} indices are no product of {[*map(len, factors)]}")
        factors = tuple(f for f in factors if len(f) > 1)
        if len(factors) == 1:
            self.tie(whole, factors[0])
        elif factors:
            self.products.append(Product(whole, factors))

    def split(self, whole: Axis, sizes: tuple[int, ...]) -> tuple[Axis, ...]:
        """The factors of an axis; the same ones whenever it is split in the same way."""
        key = (whole.tobytes(), sizes)
        if key not in self._splits:
            self._splits[key] = self.axes(sizes)
            self.product(whole, self._splits[key])
        return self._splits[key]

    def join(self, factors: tuple[Axis, ...]) -> Axis:
        """The axis of tuples of indices of factors; the same one whenever they are joined."""
        key = tuple(f.tobytes() for f in factors)
        if key not in self._joins:
            self._joins[key] = self.axis(math.prod(map(len, factors)))
            self.product(self._joins[key], factors)
        return self._joins[key]
