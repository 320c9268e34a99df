"""How far leaves, entries of their stacks, and outputs of their products are from those before."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import materialize
from jaxopt_compress.compression.compress import Globs
from jaxopt_compress.compression.output_error import OutputError, output_error
from jaxopt_compress.lift import Statistics, Uses, layout_of
from jaxopt_compress.tree.paths import fit_of
from jaxopt_compress.typing import Leaf, PyTree


def stacks_of(
    leaves: Mapping[str, Leaf], uses: Uses | None, stack: Mapping[Globs, int] | None
) -> dict[str, int]:
    """Path -> how many leading axes are a stack: as said, else as uses know.

    Raises:
        ValueError: A leaf has no axes besides.
    """
    found = {}
    for path, w in leaves.items():
        said = (n for globs, n in (stack or {}).items() if fit_of(globs, path, w))
        layout = layout_of(uses[path]) if uses is not None and path in uses else None
        axes = () if layout is None else layout.stack
        leading = range(-len(w.shape), 0)
        known = next((i for i, d in enumerate(leading) if d not in axes), 0)
        found[path] = next(said, known)
        if not 0 <= found[path] < max(len(w.shape), 1):
            raise ValueError(
                f"stack= takes {found[path]} leading axes of {path!r} of shape {tuple(w.shape)} "
                "for a stack; each entry is an array of its own, so that some axes are left"
            )
    return found


def norms(w: Leaf, small: PyTree) -> dict[str, float]:
    """The zeros of a leaf, and the Frobenius norms of the leaf before and of its error."""
    # Numbers on the host are added up in double precision, at any scale.
    zeros, *parts = (float(x) for x in _norms(w, small))
    if w is small:
        parts[2:] = 0.0, 0.0  # A leaf with NaNs that was left alone is still equal to itself.
    norm, error = (parts[i] * math.sqrt(parts[i + 1]) for i in (0, 2))
    return {"zeros": zeros, "norm": norm, "error_norm": error}


@jax.jit
def _norms(w: Leaf, small: PyTree) -> tuple[jax.Array, ...]:
    w, small = materialize((w, small))
    wide = jnp.complex64 if jnp.iscomplexobj(w) else jnp.float32
    zeros = jnp.sum(small == jnp.zeros((), small.dtype), dtype=jnp.uint32)
    return zeros, *_norm(w.astype(wide)), *_norm(w.astype(wide) - small.astype(wide))


def _norm(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Frobenius norm as ``largest * sqrt(sum)``, which neither overflows nor underflows."""
    magnitude = jnp.abs(x)
    largest = jnp.max(magnitude, initial=0)
    return largest, jnp.sum((magnitude / jnp.where(largest > 0, largest, 1)) ** 2)


@functools.partial(jax.jit, static_argnums=2)
def entry_errors(w: Leaf, small: PyTree, stack: int) -> jax.Array:
    """The relative error of each entry of the ``stack`` leading axes; 0 where nothing changed."""
    w, small = (x.astype(jnp.float32) for x in materialize((w, small)))
    sizes = lambda x: _norm(x)[0] * jnp.sqrt(_norm(x)[1])

    def of_entry(w: jax.Array, small: jax.Array) -> jax.Array:
        norm, error = sizes(w), sizes(w - small)
        return jnp.where(error == 0, 0.0, error / norm)

    for _ in range(stack):
        of_entry = jax.vmap(of_entry)
    return of_entry(w, small)


@functools.partial(jax.jit, static_argnums=3)
def output_errors(w: Leaf, small: PyTree, stats: Statistics, stack: int) -> OutputError:
    """The relative error of the outputs of products, of the whole leaf and of each entry.

    Args:
        w: The leaf before.
        small: The leaf after.
        stats: What met it; entries without statistics of their own share those of all.
        stack: How many leading axes are stacks.
    """
    w, small = materialize((w, small))
    found = output_error(w, small, stats)
    if stats.rows.ndim or not stack:
        return found
    each = lambda w, small: output_error(w, small, stats).whole
    for _ in range(stack):
        each = jax.vmap(each)
    return found._replace(each=each(w, small))


def histogram(bins: int, w: Leaf, small: PyTree) -> dict[str, object]:
    """How many entries there are in each of several ranges, before and after."""
    low, high, *counts = _counts(bins, w, small)
    before, after = (x.tolist() for x in counts)
    return {"low": float(low), "high": float(high), "before": before, "after": after}


@functools.partial(jax.jit, static_argnums=0)
def _counts(bins: int, w: Leaf, small: PyTree) -> tuple[jax.Array, ...]:
    both = [materialize(x).astype(jnp.float32).ravel() for x in (w, small)]
    low, high = (f(jnp.stack([f(x) for x in both])) for f in (jnp.min, jnp.max))
    width = jnp.where(high > low, high - low, 1)
    at = [jnp.clip((x - low) / width * bins, 0, bins - 1).astype(jnp.int32) for x in both]
    return low, low + width, *(jnp.zeros(bins, jnp.int32).at[i].add(1) for i in at)
