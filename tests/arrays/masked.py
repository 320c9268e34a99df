"""Masks of examples, and sparse arrays of float values under them."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays.sparse import sparse_nm, sparse_rows
from tests.arrays.example import Example, normal


class Rows(NamedTuple):
    """An unstructured mask: ``kept`` entries in the first row of a stack, fewer in the others."""

    shape: tuple[int, ...]
    kept: int

    def mask(self, rng, stack):
        rows, size = math.prod(stack), math.prod(self.shape)
        mask = np.zeros((rows, size), bool)
        for i in range(rows):
            mask[i, rng.permutation(size)[: max(self.kept - 9 * i, 0)]] = True
        return mask.reshape(*stack, *self.shape)

    def store(self, dense, mask):
        return sparse_rows(dense, jnp.asarray(mask), len(self.shape))

    def place(self, dense, mask, values):
        rows = mask.reshape(-1, math.prod(self.shape))
        values = values.reshape(len(rows), values.shape[-1])
        at, column = np.nonzero(rows)
        slot = np.concatenate([np.arange(row.sum()) for row in rows]).astype(int)
        flat = dense.reshape(rows.shape).at[at, column].set(values[at, slot])
        return flat.reshape(mask.shape)


class Groups(NamedTuple):
    """A mask of at most ``n`` of ``m`` entries along ``axis``; some groups keep fewer."""

    shape: tuple[int, ...]
    n: int
    m: int
    axis: int

    def mask(self, rng, stack):
        mask = np.zeros((*stack, *self.shape), bool)
        lines = np.moveaxis(mask, self.axis, -1)
        for index in np.ndindex(lines.shape[:-1]):
            for start in range(0, lines.shape[-1], self.m):
                order = start + rng.permutation(min(self.m, lines.shape[-1] - start))
                lines[index][order[: rng.integers(self.n, endpoint=True)]] = True
        return mask

    def store(self, dense, mask):
        return sparse_nm(dense, jnp.asarray(mask), self.n, self.m, self.axis)

    def place(self, dense, mask, values):
        at = mask.ndim + self.axis
        index, source = np.nonzero(mask), []
        seen = {}
        for entry in zip(*index, strict=True):
            group = (*entry[:at], entry[at] // self.m, *entry[at + 1 :])
            seen[group] = slot = seen.get(group, -1) + 1
            source.append((*entry[:at], group[at] * self.n + slot, *entry[at + 1 :]))
        return dense.at[index].set(values[tuple(np.array(source).T)])


def sparse(keep, dtype="float32"):
    """Float values under a mask."""

    def build(rng, stack):
        mask = keep.mask(rng, stack)
        leaf = keep.store(normal(rng, *stack, *keep.shape, dtype=dtype), mask)
        return Example(leaf, lambda v: keep.place(jnp.zeros(mask.shape, v.dtype), mask, v))

    return build
