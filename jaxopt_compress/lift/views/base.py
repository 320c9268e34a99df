"""Views of arrays; each kind of compressed array registers its own.

Each function takes an array and returns one with its fields permuted, cut or relabelled.
Axes are counted from the front.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxopt_compress.typing import Value


class NoView(Exception):
    """The stored form has no such view."""


class Cut(NamedTuple):
    """Part of an axis.

    Attributes:
        start: A Python integer; or a traced one, which is clamped as in `jax.lax.dynamic_slice`.
        size: How many entries it spans.
        stride: Every how many of them one is taken; 1 if ``start`` is traced.
    """

    start: Value
    size: int
    stride: int = 1


@functools.singledispatch
def transposed(x: Value, order: Sequence[int]) -> Value:
    """`jax.lax.transpose`."""
    return jnp.transpose(x, order)


@functools.singledispatch
def cut(x: Value, cuts: Mapping[int, Cut]) -> Value:
    """`jax.lax.slice` or `jax.lax.dynamic_slice`; axes that ``cuts`` does not name stay whole."""
    if not cuts:
        return x
    every = [cuts.get(d, Cut(0, n)) for d, n in enumerate(x.shape)]
    if any(not isinstance(c.start, int) for c in every):
        return lax.dynamic_slice(x, [c.start for c in every], [c.size for c in every])
    bounds = ((c.start, c.start + c.size, c.stride) for c in every)
    return lax.slice(x, *zip(*bounds, strict=True))


@functools.singledispatch
def reshaped(x: Value, new: tuple[int, ...]) -> Value:
    """`jax.lax.reshape`; axes of size 1 come and go that way too."""
    return x.reshape(new)


@functools.singledispatch
def flipped(x: Value, axes: Sequence[int]) -> Value:
    """`jax.lax.rev`."""
    return lax.rev(x, axes)


@functools.singledispatch
def scaled(x: Value, factor: Value) -> Value:
    """The product with one floating number."""
    return (x * factor).astype(x.dtype)


@functools.singledispatch
def rescaled(x: Value, factors: jax.Array) -> Value:
    """The product with an array of the same rank, of size 1 along some axes."""
    del x, factors
    raise NoView


@functools.singledispatch
def cast(x: Value, dtype: DTypeLike) -> Value:
    """Another floating dtype."""
    return x.astype(dtype)


@functools.singledispatch
def stacked(x: Value, length: int) -> Value:
    """The same array, its fields whole along the leading axis, so that a scan can strip it."""
    return jnp.broadcast_to(x, (length, *x.shape[1:]))


def matching_runs(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]] | None:
    """Cuts two shapes of the same size into the shortest runs of axes with equal products.

    Example:
        >>> matching_runs((2, 3, 4), (6, 4))
        [([0, 1], [0]), ([2], [1])]
    """
    runs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        a, b = math.prod(old[k] for k in left), math.prod(new[k] for k in right)
        i, j = i + len(left), j + len(right)
        while a != b:
            if a < b and i < len(old):
                a, i = a * old[i], i + 1
                left.append(i - 1)
            elif b < a and j < len(new):
                b, j = b * new[j], j + 1
                right.append(j - 1)
            else:
                return None
        runs.append((left, right))
    return runs


class Regrouping(NamedTuple):
    """A reshape, as runs of old axes that become runs of new ones.

    Attributes:
        old: The shape before.
        new: The shape after.
        runs: From `matching_runs`.
        axis: The old axis along which some fields count groups or words, or None.
        place: The new axis that takes its part.
    """

    old: tuple[int, ...]
    new: tuple[int, ...]
    runs: list[tuple[list[int], list[int]]]
    axis: int | None
    place: int | None

    @classmethod
    def of(cls, old: tuple[int, ...], new: tuple[int, ...], axis: int | None) -> "Regrouping":
        """Finds the runs of a reshape; groups go on along the last axis of theirs.

        Raises:
            NoView: There are none.
        """
        runs = matching_runs(old, new)
        if runs is None or 0 in old:
            raise NoView
        place = None
        if axis is not None and new:
            news = next(news for olds, news in runs if axis in olds)
            wide = [d for d in news if new[d] > 1] or news
            place = wide[-1] if wide else len(new) - 1
        return cls(old, new, runs, axis, place)

    def shape(self, field: Sequence[int], parts: bool = False) -> tuple[int, ...]:
        """The new shape of a field, whole or of size 1 along each run.

        Args:
            field: Its shape.
            parts: Whether it has one entry for several along ``axis``.

        Raises:
            NoView: It is whole along part of a run, or its groups would not stay together.
        """
        result = [1] * len(self.new)
        for olds, news in self.runs:
            have, full = [field[d] for d in olds], [self.old[d] for d in olds]
            if parts and self.axis in olds:
                have[olds.index(self.axis)] = self.old[self.axis]
                behind = any(self.old[d] > 1 for d in olds if d > self.axis)
                if behind or have != full or self.place not in news:
                    raise NoView
            elif all(n == 1 for n in have):
                continue
            if have != full:
                raise NoView
            for d in news:
                result[d] = self.new[d]
            if parts and self.axis in olds:
                whole = self.new[self.place] * field[self.axis]  # pyright: ignore
                result[self.place] = whole // self.old[self.axis]  # pyright: ignore
        return tuple(result)
