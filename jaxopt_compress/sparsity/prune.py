"""Pruning by score, along a schedule, to a pattern."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.arrays import (
    MaskedArray,
    QuantizedArray,
    is_compressed,
    materialize,
)
from jaxopt_compress.arrays.sparse import sparse_nm, sparse_rows
from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    LeafState,
    NeedsStats,
    Parameter,
    compression_of,
    spelled,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.compression.leaf_states import GRID, N_M, RANK, ZEROS
from jaxopt_compress.numerics.ordering import computed_after
from jaxopt_compress.numerics.patterns import n_m_mask
from jaxopt_compress.numerics.thresholds import largest
from jaxopt_compress.sparsity.schedules import Schedule, keep_count
from jaxopt_compress.sparsity.scores import Score, as_score, is_magnitude
from jaxopt_compress.tree import Where


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mask", "threshold", "kept"],
    meta_fields=["pattern", "axis", "stack"],
)
@dataclasses.dataclass(frozen=True)
class PrunedState(LeafState):
    """The mask of one parameter.

    Attributes:
        mask: Booleans, true where an entry is kept.
        threshold: The score that separated them, one per stack entry; where the next search starts.
        kept: Arrays that the score needs besides the parameter, or None.
        pattern: ``(n, m)``, or None if unstructured.
        axis: The negative axis of the groups of an n:m pattern, or None.
        stack: How many leading axes hold parameters of their own.
    """

    mask: Any
    threshold: Any
    kept: Any
    pattern: tuple[int, int] | None
    axis: int | None
    stack: int
    kind = "prune"
    keeps = frozenset({ZEROS, N_M, RANK, GRID})

    @property
    def establishes(self) -> frozenset[str]:
        """Zeros, and perhaps a pattern of them."""
        return frozenset({ZEROS} if self.pattern is None else {ZEROS, N_M})

    def apply(self, w: Any, learned: Any) -> MaskedArray:
        """``w`` under the mask."""
        del learned
        return MaskedArray(materialize(w), self.mask)

    def before(self, g: jax.Array) -> jax.Array:
        """``g`` itself, computed after the mask."""
        if self.threshold is None:
            return g
        return computed_after(g, self.threshold)

    def compress(self, w: Any, learned: Any, path: str) -> Any:
        """The kept entries; of a quantized array, the kept codes."""
        del learned, path
        if isinstance(w, QuantizedArray):
            return w.replace(codes=self._store(w.unpacked()), block=None)
        return self._store(materialize(w))

    def _store(self, dense: jax.Array) -> Any:
        if self.pattern is not None and not bool(jnp.all(self.mask)):
            return sparse_nm(dense, self.mask, *self.pattern, self.axis)  # pyright: ignore
        return sparse_rows(dense, self.mask, dense.ndim - self.stack)


_ELSEWHERE = {
    **dict.fromkeys(
        ("sparsity", "amount", "final_sparsity", "target_sparsity"),
        "the schedule says it, as in prune(scores.magnitude(), schedules.constant(0.5))",
    ),
    **dict.fromkeys(("n", "m", "prune_n", "prune_m", "sparsity_type"), "write pattern='2:4'"),
    **dict.fromkeys(
        ("frequency", "begin_step", "end_step", "pruning_schedule", "scheduler"),
        "write it as a schedule, such as schedules.polynomial(0.9, begin=0, end=1000, every=10)",
    ),
    **dict.fromkeys(("params", "layers", "targets"), "write where='**/kernel'"),
}


@answers(_ELSEWHERE)
def prune(
    score: Score | Callable[[Parameter], jax.Array],
    schedule: Schedule,
    pattern: str | None = None,
    where: Where = None,
    *,
    stack: int = 0,
) -> Compression:
    """Sets the entries with the lowest scores to zero, per parameter, and stores only the others.

    Each parameter (each entry of a stack on its own) keeps exactly
    ``size - round(size * sparsity)`` entries; among equal scores the ones with the lower row-major
    index. Masks are decided in ``init`` at step 0 and renewed by ``update`` at the steps where the
    schedule is due, from the parameters passed in; entries that were pruned can come back, since
    the optimizer keeps all of them. The derivative at a pruned entry is 0. In a chain after another
    ``prune`` only entries that it kept are kept.

    Args:
        score: Which entries are kept: one of `jaxopt_compress.scores`, or a function
            ``(parameter) -> scores``, of the shape of ``parameter.value`` and at least 0.
        schedule: One of `jaxopt_compress.schedules`.
        pattern: None or ``"unstructured"``; or ``"n:m"``, such as ``"2:4"``: of each ``m``
            consecutive entries along the contracted axis the ``n`` with the highest scores stay,
            from the first step on at which the schedule asks for any sparsity. The schedule then
            has to end at ``1 - n / m``.
        where: Which parameters; by default the floating ones of rank 2 and more, and where uses are
            given only those with a use.
        stack: How many leading axes of each are a stack of parameters of their own, whatever uses
            say of them, such as the members of an ensemble under `jax.vmap`.

    Returns:
        A `Compression` that stores `SparseArray`.

    Raises:
        TypeError: ``score`` or ``schedule`` is none.
        ValueError: A pattern that cannot be read, or that contradicts the schedule.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> c = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), pattern="2:4")
        >>> jc.compress({"w": jnp.arange(1.0, 9.0).reshape(8, 1)}, c)["w"].materialize()[:, 0]
        Array([0., 0., 3., 4., 0., 0., 7., 8.], dtype=float32)

    References:
        Zhu and Gupta, 2017, To Prune, or Not to Prune. Mishra et al., 2021, Accelerating Sparse
        Deep Neural Networks.
    """
    by = as_score(score)
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule={schedule!r} is no schedule; jaxopt_compress.schedules.constant(0.5) is one"
        )
    n_m = _read_pattern(pattern, schedule)

    def check(parameter: Parameter) -> None:
        value, layout = parameter.value, parameter.layout
        if is_compressed(value) and not isinstance(value, _PRUNABLE):
            raise TypeError(
                f"{parameter.describe()} is a {type(value).__name__} and cannot be pruned; prune "
                "before, or materialize it first"
            )
        if not value.shape:
            raise ValueError(f"{parameter.describe()} is a scalar and cannot be pruned; exclude it")
        if n_m is not None and layout.group_axis is None:
            raise ValueError(
                f"{parameter.describe()} has no contracted axis for the pattern {pattern!r}; "
                "prune it unstructured"
            )

    def init(parameter: Parameter) -> Decision:
        ndim, layout = len(parameter.value.shape), parameter.layout
        try:
            # Arrays of its own, which a step may donate.
            kept = jax.tree.map(jnp.copy, by.keep(parameter))
            made = jax.eval_shape(
                lambda value: by.score(parameter._replace(value=value), kept), parameter.value
            )
        except AttributeError as error:
            if parameter.stats is not None or "NoneType" not in str(error):
                raise
            raise NeedsStats(
                f"the score of {parameter.describe()} reads its stats, and there are none: pass "
                "stats=jaxopt_compress.calibrate(fn, params, batches); in training, a Score keeps "
                "what it needs of them"
            ) from error
        if made.shape != tuple(parameter.value.shape):
            raise ValueError(
                f"the score has shape {made.shape} for {parameter.describe()}; it has to "
                "score each entry"
            )
        stack = next((d for d in range(ndim) if d - ndim not in layout.stack), ndim - 1)
        axis = layout.group_axis if n_m is not None else None
        state = PrunedState(None, None, kept, n_m, axis, stack)
        return Decision(renewed(state, jnp.zeros((), jnp.int32), parameter))

    def renewed(state: PrunedState, count: jax.Array, parameter: Parameter) -> PrunedState:
        # The search ignores signs; absolute values would be one more array of this size.
        fast = is_magnitude(by)
        scores = parameter.dense() if fast else by.score(parameter, state.kept)
        if parameter.keep is not None:
            scores = jnp.where(parameter.keep, scores, 0)
        sparsity = schedule.sparsity(count)
        if n_m is not None:
            mask = n_m_mask(scores, *n_m, state.axis) | (sparsity <= 0)  # pyright: ignore
            return dataclasses.replace(state, mask=_within(mask, parameter))
        keep = keep_count(math.prod(scores.shape[state.stack :]), sparsity)
        found = largest(scores, keep, stack_ndim=state.stack, hint=state.threshold)
        mask = _within(found.mask, parameter)
        return dataclasses.replace(state, mask=mask, threshold=found.threshold)

    def update(decision: Decision, count: jax.Array, parameter: Parameter) -> Decision:
        # A loop of at most one turn, since a branch that keeps the mask would copy it.
        once = lambda carry: (jnp.zeros_like(carry[0]), renewed(carry[1], count, parameter))
        due = schedule.due(count)
        return Decision(lax.while_loop(lambda carry: carry[0], once, (due, decision.state))[1])

    asked = spelled("prune", pattern=pattern, where=where, stack=stack or None)
    return compression_of(LeafMethod(check, init, update), where, stack=stack, asked=asked)


_PRUNABLE = (QuantizedArray, MaskedArray)


def _within(mask: jax.Array, parameter: Parameter) -> jax.Array:
    """The mask without entries that earlier elements fixed at zero."""
    return mask if parameter.keep is None else mask & parameter.keep


def _read_pattern(pattern: str | None, schedule: Schedule) -> tuple[int, int] | None:
    if pattern in (None, "unstructured"):
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(
            f"pattern={pattern!r}; it is 'unstructured' or 'n:m' with 0 < n < m, such as '2:4'"
        )
    n, m = int(match[1]), int(match[2])
    final = float(schedule.sparsity(jnp.int32(2**31 - 1)))
    if abs(final - (1 - n / m)) > 1e-6:
        raise ValueError(
            f"pattern={pattern!r} prunes {1 - n / m:.6g} of the entries, but the schedule ends at "
            f"{final:.6g}; use schedules.constant({1 - n / m:.6g}) or a schedule that ends there"
        )
    return n, m
