"""Scores of units, from scores of the entries of parameters."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.compression import NeedsStats, Parameter
from jaxopt_compress.compression.leaf_states import as_jax
from jaxopt_compress.compression.selection import chosen_parameters
from jaxopt_compress.lift import Stats, Uses
from jaxopt_compress.sparsity.score import Score
from jaxopt_compress.sparsity.scores import is_magnitude
from jaxopt_compress.tree import assume_layout, named_leaves
from jaxopt_compress.typing import Leaf, PyTree

Reduce = Literal["l2", "sum", "mean", "max"]


def entry_scores(
    by: Score,
    params: PyTree,
    paths: frozenset[str],
    grads: Mapping[str, Leaf],
    uses: Uses | None,
    stats: Stats | None,
) -> dict[str, jax.Array]:
    """Path -> the scores of a parameter's entries; none where what a score reads cannot be."""
    scored = {}
    for path, parameter in _parameters(by, params, paths, uses, stats).items():
        parameter = parameter._replace(grad=grads.get(path))
        try:
            kept = by.keep(parameter)
        except AttributeError as error:
            # Nothing meets a bias; `parameter.stats` is None then.
            if parameter.stats is not None or "NoneType" not in str(error):
                raise
            if stats is None:
                raise NeedsStats(
                    f"the score of {parameter.describe()} reads its stats, and there are none: "
                    "pass stats=jaxopt_compress.calibrate(fn, params, batches)"
                ) from error
            continue
        # Scores that accumulate gradients see these.
        kept = kept if by.advance is None else by.advance(parameter, kept)
        found = by.score(parameter, kept)
        if jnp.shape(found) != tuple(parameter.value.shape):
            raise ValueError(
                f"the score has shape {jnp.shape(found)} for {parameter.describe()}; it has to "
                "score each entry"
            )
        scored[path] = found
    return scored


def _parameters(
    by: Score, params: PyTree, paths: frozenset[str], uses: Uses | None, stats: Stats | None
) -> dict[str, Parameter]:
    """Path -> parameter, of those at some paths."""
    if is_magnitude(by):
        # It reads no layout, and to assume one would be worth a warning.
        leaves = [(path, as_jax(x)) for path, x in named_leaves(params) if path in paths]
        return {path: Parameter(path, x, assume_layout(x.shape)) for path, x in leaves}
    return chosen_parameters(params, lambda path, leaf: path in paths, uses, stats)


def unit_scores(
    scores: Mapping[str, jax.Array], members: Sequence[tuple[str, int, np.ndarray]], reduce: Reduce
) -> np.ndarray:
    """One score per unit, over all entries that go with it, each once.

    Args:
        scores: Path -> the scores of entries.
        members: Path, axis, and the indices of each unit, ``[units, count]``.
        reduce: ``l2``, ``sum``, ``mean`` or ``max``.
    """
    axes: dict[str, list[tuple[int, np.ndarray]]] = {}
    for path, axis, indices in members:
        if path in scores:
            axes.setdefault(path, []).append((axis, indices))
    if reduce == "max":
        largest = lambda x, axis: np.asarray(x.max(tuple(i for i in range(x.ndim) if i != axis)))
        found = [largest(scores[p], k)[at].max(1) for p, own in axes.items() for k, at in own]
        return np.max(found, axis=0)
    power = 2 if reduce == "l2" else 1
    total = sum(_sums(jnp.float32(scores[path]) ** power, own) for path, own in axes.items())
    if reduce == "mean":
        total = total / sum(_sums(jnp.ones(scores[path].shape), own) for path, own in axes.items())
    return np.asarray(np.sqrt(total) if reduce == "l2" else total)


def _sums(entries: jax.Array, axes: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """Per unit, the sum of the entries of which one of some indices is the unit's.

    By inclusion and exclusion, since two indices of one entry may be.
    """
    total = np.zeros(len(axes[0][1]))
    for size in range(1, len(axes) + 1):
        for some in itertools.combinations(axes, size):
            own = [axis for axis, _ in some]
            rest = tuple(i for i in range(entries.ndim) if i not in own)
            table = np.asarray(entries.sum(rest), np.float64)
            shape = lambda k, n, size=size: (-1, *(n if i == k else 1 for i in range(size)))
            at = [
                indices.reshape(shape(k, indices.shape[1])) for k, (_, indices) in enumerate(some)
            ]
            total += (-1) ** (size + 1) * table[tuple(at)].reshape(len(total), -1).sum(1)
    return total


def block_scores(
    scores: Mapping[str, jax.Array], blocks: Sequence[Sequence[str]], reduce: Reduce
) -> np.ndarray:
    """One score per block, over all entries of its parameters."""
    by = {
        "l2": lambda x: np.sqrt(np.square(x).sum()), "sum": np.sum, "mean": np.mean,
        "max": lambda x: x.max(initial=0),
    }  # fmt: skip
    flat = lambda paths: [
        np.asarray(scores[p], np.float64).reshape(-1) for p in paths if p in scores
    ]
    return np.array([by[reduce](np.concatenate(flat(paths) or [np.zeros(1)])) for paths in blocks])
