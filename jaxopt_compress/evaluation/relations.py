"""How the outputs of one variant relate to those of another, and to what they depend on."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.evaluation.corruptions import is_signal
from jaxopt_compress.evaluation.metric import Metric, mean
from jaxopt_compress.evaluation.scores import answers, are_scores
from jaxopt_compress.evaluation.sums import weighted_sum
from jaxopt_compress.lift import lift
from jaxopt_compress.lift.interpreter import OnFallback
from jaxopt_compress.typing import PyTree


def relations(outputs: PyTree, targets: PyTree) -> tuple[Metric, ...]:
    """Figures that relate outputs to those of the first variant."""
    return (_AGREEMENT, _DIFFERENCE) if are_scores(outputs, targets) else (_DIFFERENCE,)


@functools.lru_cache(16)
def input_gradients(fn: Callable[..., PyTree], on_fallback: OnFallback) -> Callable[..., jax.Array]:
    """``run(params, inputs, picked)``: how an output depends on each entry of the inputs.

    Args:
        fn: Called as ``fn(params, *inputs)``; it is lifted here.
        on_fallback: As in `lift`.

    Returns:
        The gradient of the score of class ``picked``, ``[n]``, of each example, or of the sum of
        its outputs if that is None, as ``[n, entries]``. Images of bytes are given as floats.
    """
    lifted = fn if getattr(fn, "is_lifted", False) else lift(fn, on_fallback)

    def run(params: PyTree, inputs: tuple[PyTree, ...], picked: jax.Array | None) -> jax.Array:
        leaves, treedef = jax.tree.flatten(inputs)
        count = next(x.shape[0] for x in leaves if is_signal(x))
        at = [i for i, x in enumerate(leaves) if is_signal(x) and x.shape[0] == count]

        def score(signals: list[jax.Array]) -> jax.Array:
            new = dict(zip(at, signals, strict=True))
            given = [new.get(i, x) for i, x in enumerate(leaves)]
            outputs = lifted(params, *jax.tree.unflatten(treedef, given))
            if picked is None:
                return sum((jnp.sum(y) for y in jax.tree.leaves(outputs)), jnp.zeros(()))
            own = jnp.maximum(picked, 0)[..., None]
            return jnp.sum(jnp.take_along_axis(outputs, own, axis=-1))

        wide = lambda x: x.astype(jnp.float32) if x.dtype == jnp.uint8 else x
        slopes = jax.grad(score)([wide(leaves[i]) for i in at])
        flat = [g.reshape(count, -1).astype(jnp.float32) for g in slopes]
        return jnp.concatenate(flat, axis=1)

    run.is_lifted = True
    return run


def _agree(outputs: jax.Array, reference: jax.Array) -> jax.Array:
    return answers(outputs) == answers(reference)


def _squares(
    outputs: PyTree, reference: PyTree, weights: jax.Array | None
) -> tuple[PyTree, PyTree]:
    """The squared norms of the difference and of the reference."""
    leaves = [jax.tree.leaves(tree) for tree in (outputs, reference)]
    pairs = [[jnp.asarray(x, jnp.float32) for x in pair] for pair in zip(*leaves, strict=True)]
    return (
        sum(weighted_sum((y - of_first) ** 2, weights) for y, of_first in pairs),
        sum(weighted_sum(of_first**2, weights) for _, of_first in pairs),
    )


def _relative_norm(squares: Sequence[np.ndarray]) -> float:
    differs, whole = (math.sqrt(x) for x in squares)
    return differs / whole if whole else 0.0 if differs == 0 else math.inf


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """The cosine between rows of two matrices; 1 if both are 0, and 0 if one of them is."""
    x, y = _in_range(x), _in_range(y)
    dot = jnp.einsum("nk,nk->n", x, y, precision="highest")
    sizes = jnp.linalg.norm(x, axis=1), jnp.linalg.norm(y, axis=1)
    both = sizes[0] * sizes[1]
    return jnp.where(both > 0, dot / jnp.where(both > 0, both, 1), sizes[0] == sizes[1])


def _in_range(x: jax.Array) -> jax.Array:
    """Rows over their largest entries, whose squares are neither 0 nor infinite."""
    top = jnp.max(jnp.abs(x), axis=1, keepdims=True, initial=0)
    return x / jnp.where(top > 0, top, 1)


def _rank_correlation(x: jax.Array, y: jax.Array) -> jax.Array:
    """Spearman's, of the rows of two matrices; equal entries share the mean of their ranks."""

    def centred(row: jax.Array) -> jax.Array:
        ordered = jnp.sort(row)
        low, high = (jnp.searchsorted(ordered, row, side) for side in ("left", "right"))
        return (low + high) / 2 - len(row) / 2

    return _cosine(jax.vmap(centred)(x), jax.vmap(centred)(y))


_AGREEMENT = mean(_agree, "agreement")
_DIFFERENCE = Metric("difference", _squares, _relative_norm)
ATTRIBUTION = mean(_cosine, "attribution_cosine"), mean(_rank_correlation, "attribution_rank")
