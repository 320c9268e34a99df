"""What running a function with its parameters costs: operations, bytes, energy."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import InputQuantizedArray, TensorTrainArray, is_compressed
from jaxopt_compress.arrays.base import stored_bytes
from jaxopt_compress.lift import Use
from jaxopt_compress.tree import named_leaves
from jaxopt_compress.typing import Leaf, PyTree

# Picojoules in 45 nm at 0.9 V: Horowitz, 2014, Computing's Energy Problem, table of figure 1.1.9.
# One multiplication and one addition; int8 products are added up in 32 bits.
_PJ_FLOAT = {32: 3.7 + 0.9, 16: 1.1 + 0.4}
_PJ_INT8 = 0.2 + 0.1
# The lower end of 1.3 to 2.6 nJ for 64 bits of DRAM.
_PJ_BYTE = 1300 / 8


def product_flops(uses: Sequence[Use], leaf: Leaf) -> int | None:
    """Floating operations of the products of a parameter, in the form in which they run.

    None where the length of a loop is unknown.
    """
    counts = [use.flops for use in uses]
    return None if None in counts else round(sum(n for n in counts if n) * _share(leaf))


def read_bytes(uses: Sequence[Use] | None, stored: int | None) -> int | None:
    """Bytes of a parameter that a call has to read, if it reads it once.

    The least that any program needs, also where a loop reads it again. Tables that are only looked
    up count as nothing: what is read of them is a few rows.
    """
    only_looked_up = bool(uses) and all(use.op == "gather" for use in uses or ())
    return 0 if only_looked_up else stored


class Running(NamedTuple):
    """What a call costs in the products of some parameters.

    Attributes:
        flops: Floating operations, without indices of which every entry is masked, which removal
            takes out of the program; None where the length of a loop is unknown.
        moved: Bytes that it has to read at least.
    """

    flops: int | None
    moved: int | None


def running(uses: Mapping[str, Sequence[Use]], leaves: Mapping[str, Leaf]) -> Running:
    """What the products of leaves cost, ``{path: leaf}``."""
    counts = [product_flops(uses.get(path, ()), w) for path, w in leaves.items()]
    shares = [_removed_share(w) for w in leaves.values()]
    moved = [read_bytes(uses.get(path), stored_bytes(w)) or 0 for path, w in leaves.items()]
    if None in counts:
        return Running(None, sum(moved))
    return Running(
        round(sum((n or 0) * share for n, share in zip(counts, shares, strict=True))), sum(moved)
    )


def _removed_share(leaf: Leaf) -> float:
    """The share of a parameter without the indices of which every entry is masked."""
    kept = leaf.kept() if is_compressed(leaf) else None
    if kept is None:
        return 1.0
    across = [tuple(d for d in range(kept.ndim) if d != axis) for axis in range(kept.ndim)]
    return math.prod(float(jnp.any(kept, axes).mean()) for axes in across)


def moved_bytes(uses: dict[str, list[Use]], params: PyTree, *others: PyTree) -> int:
    """Bytes that a call has to move at least: parameters as stored, arguments and results, once."""
    leaves = [(path, w) for path, w in named_leaves(params) if hasattr(w, "dtype")]
    return sum(read_bytes(uses.get(p), stored_bytes(w)) or 0 for p, w in leaves) + array_bytes(
        others
    )


def array_bytes(tree: PyTree) -> int:
    """Bytes of the arrays of a tree."""
    return sum(stored_bytes(x) for x in jax.tree.leaves(tree) if hasattr(x, "dtype"))


def picojoules(uses: dict[str, list[Use]], params: PyTree, moved: int) -> float | None:
    """An estimate of the energy of a call: its products with parameters, and the bytes it moves.

    Operations and accesses to main memory at their published cost (Horowitz, 2014); caches, control
    and everything else are left out, and so is what newer processes save. It is for comparing forms
    of one function. None where the length of a loop is unknown.
    """
    total = moved * _PJ_BYTE
    leaves = dict(named_leaves(params))
    for path, found in uses.items():
        flops = product_flops(found, leaves[path])
        if flops is None:
            return None
        total += flops / 2 * _picojoules_of(leaves[path])
    return total


def runs_in_integers(leaf: Leaf) -> bool:
    """Whether the products of a parameter multiply integer codes."""
    return isinstance(leaf, InputQuantizedArray)


def _picojoules_of(leaf: Leaf) -> float:
    """The cost of one multiplication and addition."""
    if runs_in_integers(leaf):
        return _PJ_INT8
    return _PJ_FLOAT[16 if jnp.dtype(leaf.dtype).itemsize <= 2 else 32]


def _share(leaf: Leaf) -> float:
    """The operations of a product with a leaf, over those with its dense form."""
    if isinstance(leaf, TensorTrainArray):
        return min(1.0, leaf.multiplications() / math.prod(leaf.shape[-2:]))
    factors = leaf.factors().values() if is_compressed(leaf) else ()
    return sum(x.size * _share(x) for x in factors) / leaf.size if factors else 1.0
