"""From scores to masks, of parameters that are decided together."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.compression import Parameter
from jaxopt_compress.numerics.keep_count import keep_count
from jaxopt_compress.numerics.patterns import n_m_exchange, n_m_mask, transposable_mask
from jaxopt_compress.numerics.ranking import among, nonnegative
from jaxopt_compress.numerics.thresholds import largest_masks
from jaxopt_compress.sparsity.grow import Grow
from jaxopt_compress.sparsity.rules import Rules
from jaxopt_compress.sparsity.score import Score
from jaxopt_compress.sparsity.scores import is_magnitude
from jaxopt_compress.sparsity.state import PrunedState
from jaxopt_compress.sparsity.units import Pattern, Units, units_of
from jaxopt_compress.typing import PyTree

Parameters = Mapping[str, Parameter]
States = dict[str, PrunedState]


def renewed(
    rules: Rules,
    states: States,
    count: jax.Array,
    parameters: Parameters,
    shares: dict[str, Any],
    grown: bool = True,
) -> States:
    """The states with the masks of a step.

    Args:
        rules: What is asked for.
        states: Path -> state, of parameters that are decided together.
        count: The step.
        parameters: Path -> parameter.
        shares: Path -> sparsity; empty with a threshold.
        grown: Whether there are masks, of which growth exchanges entries.
    """
    if rules.pattern.n_m is not None:
        growing = grown and rules.grow is not None
        due = count if growing else None
        return {k: _in_groups(rules, s, parameters[k], shares[k], due) for k, s in states.items()}
    units = {k: units_of(p, rules.pattern, rules.scope, rules.stack) for k, p in parameters.items()}
    if rules.threshold is not None:
        masks = {k: _over(rules, p, states[k].kept, units[k], count) for k, p in parameters.items()}
        return _with_masks(states, parameters, units, masks, None)
    scores = {k: _ranked(rules, p, states[k].kept, units[k]) for k, p in parameters.items()}
    keep = keep_count(_total(scores, units), shares[next(iter(parameters))])
    if rules.grow is None or not grown:
        masks, threshold = _largest(scores, keep, units, states)
    else:
        masks, threshold = _exchanged(
            rules, rules.grow, scores, keep, count, units, states, parameters
        )
    return _with_masks(states, parameters, units, masks, threshold)


def _scores(
    score: Score, parameter: Parameter, kept: PyTree, units: Units, pattern: Pattern
) -> jax.Array:
    """Scores of units; of magnitudes the sign does not count."""
    # The search ignores signs; absolute values would be one more array of this size.
    single = pattern.kind in ("entries", "n:m")
    fast = is_magnitude(score) and single
    scores = parameter.dense() if fast else score.score(parameter, kept)
    if parameter.keep is not None and not single:
        scores = jnp.where(parameter.keep, scores, 0)
    return units.gather(scores)


def _ranked(rules: Rules, parameter: Parameter, kept: PyTree, units: Units) -> jax.Array:
    """Scores in an order that ignores signs, with entries that are fixed at zero last."""
    scores = _scores(rules.score, parameter, kept, units, rules.pattern)
    if rules.score.signed:
        scores = nonnegative(scores)
    if parameter.keep is not None and rules.pattern.kind in ("entries", "n:m"):
        scores = among(scores, units.gather(parameter.keep))
    return scores


def _over(
    rules: Rules, parameter: Parameter, kept: PyTree, units: Units, count: jax.Array
) -> jax.Array:
    """Which units reach the threshold; all, as long as there is no score."""
    assert rules.threshold is not None
    scores = _scores(rules.score, parameter, kept, units, rules.pattern)
    size = scores if rules.score.signed else jnp.abs(scores)
    return (size >= rules.threshold(count)) | (count < rules.score.begins)


def _with_masks(
    states: States,
    parameters: Parameters,
    units: dict[str, Units],
    masks: dict[str, jax.Array],
    threshold: jax.Array | None,
) -> States:
    """The states with new masks, each with an array of its own that a step may donate."""
    new = {}
    for k, p in parameters.items():
        mask = _within(units[k].spread(masks[k]), p)
        own = None if threshold is None else jnp.copy(threshold)
        new[k] = dataclasses.replace(states[k], mask=mask, threshold=own)
    return new


def _in_groups(
    rules: Rules, state: PrunedState, parameter: Parameter, share: Any, count: jax.Array | None
) -> PrunedState:
    """An n:m mask, once any sparsity is asked for; with a step, one that exchanges entries."""
    assert state.pattern is not None and state.axis is not None
    same = Units(lambda x: x, lambda mask: mask, 0)
    scores = _ranked(rules, parameter, state.kept, same)
    if count is not None and rules.grow is not None:
        by_growth = rules._replace(score=rules.grow.score)
        growth = _ranked(by_growth, parameter, state.growing, same)
        wanted = jnp.floor(rules.grow.fraction(count) * state.pattern[0] + 0.5).astype(jnp.int32)
        allowed = jnp.array(True) if parameter.keep is None else parameter.keep
        along = state.axis + scores.ndim
        mask = n_m_exchange(scores, growth, state.mask, allowed, wanted, *state.pattern, along)
    elif rules.pattern.transposable:
        blocks = transposable_mask(parameter.matrix(scores), *state.pattern)
        mask = parameter.from_matrix(blocks)
    else:
        mask = n_m_mask(scores, *state.pattern, state.axis)
    return dataclasses.replace(state, mask=_within(mask | (share <= 0), parameter))


def _within(mask: jax.Array, parameter: Parameter) -> jax.Array:
    """The mask without entries that earlier elements fixed at zero."""
    return mask if parameter.keep is None else mask & parameter.keep


def _total(scores: dict[str, jax.Array], units: dict[str, Units]) -> int:
    """How many units a pool has."""
    return sum(math.prod(x.shape[units[k].pools :]) for k, x in scores.items())


def _largest(
    scores: dict[str, jax.Array], keep: jax.Array, units: dict[str, Units], states: States | None
) -> tuple[dict[str, jax.Array], jax.Array]:
    pools = next(iter(units.values())).pools
    hint = None if states is None else next(iter(states.values())).threshold
    masks, threshold = largest_masks(list(scores.values()), keep, stack_ndim=pools, hint=hint)
    return dict(zip(scores, masks, strict=True)), threshold


def _exchanged(
    rules: Rules,
    grow: Grow,
    scores: dict[str, jax.Array],
    keep: jax.Array,
    count: jax.Array,
    units: dict[str, Units],
    states: States,
    parameters: Parameters,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Drops kept units with the lowest scores, and keeps as many others instead."""
    old = {k: units[k].gather(s.mask) > 0 for k, s in states.items()}
    free = {k: ~mask for k, mask in old.items()}
    for k, p in parameters.items():
        if p.keep is not None:
            free[k] &= units[k].gather(p.keep) > 0
    pools = next(iter(units.values())).pools

    def counted(masks: dict[str, jax.Array]) -> Any:
        return sum(jnp.sum(m, tuple(range(pools, m.ndim)), dtype=jnp.int32) for m in masks.values())

    wanted = jnp.floor(grow.fraction(count) * keep + 0.5).astype(jnp.int32)
    # However sparsity moves, no more can be grown than are free, nor more stay than there were.
    grown = jnp.minimum(jnp.maximum(wanted, keep - counted(old)), counted(free))
    stay, threshold = _largest(
        {k: among(s, old[k]) for k, s in scores.items()}, keep - grown, units, states
    )
    by_growth = rules._replace(score=grow.score)
    by = {k: _ranked(by_growth, p, states[k].growing, units[k]) for k, p in parameters.items()}
    new, _ = _largest({k: among(s, free[k]) for k, s in by.items()}, grown, units, None)
    return {k: stay[k] | new[k] for k in stay}, threshold
