"""Deciding masks: of all parameters, from scores, at a step."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.compression import Decision, NeedsStats, Parameter
from jaxopt_compress.numerics.keep_count import keep_count
from jaxopt_compress.numerics.patterns import n_m_mask
from jaxopt_compress.numerics.ranking import among, nonnegative
from jaxopt_compress.numerics.thresholds import largest_masks
from jaxopt_compress.sparsity.distributions import Distribution, Size
from jaxopt_compress.sparsity.grow import Grow
from jaxopt_compress.sparsity.schedule import Schedule
from jaxopt_compress.sparsity.score import Score
from jaxopt_compress.sparsity.scores import is_magnitude
from jaxopt_compress.sparsity.state import PrunedState, leading_stack
from jaxopt_compress.sparsity.units import Pattern, Units, units_of
from jaxopt_compress.tree.meshes import on_auto_axes

Parameters = Mapping[str, Parameter]
States = dict[str, PrunedState]


class Rules(NamedTuple):
    """What `prune` was asked for.

    Attributes:
        score: Which entries are kept.
        schedule: How many; None with a threshold.
        threshold: The step to the least score that is kept; None with a schedule.
        pattern: What is kept or pruned as one.
        scope: What is compared with what, one of `units.SCOPES`.
        distribution: Sparsity per parameter; None if it is that of the schedule.
        grow: How kept entries are exchanged; None if they are not.
        stack: How many leading axes are parameters of their own.
        straight_through: Whether pruned entries get gradients.
        zero: Whether training sets pruned entries to 0.
    """

    score: Score
    schedule: Schedule | None
    threshold: Callable[[Any], Any] | None
    pattern: Pattern
    scope: str
    distribution: Distribution | None
    grow: Grow | None
    stack: int
    straight_through: bool
    zero: bool


def first(rules: Rules, parameters: Parameters) -> dict[str, Decision]:
    """The decisions of ``init``: the masks of step 0."""
    count, states = jnp.zeros((), jnp.int32), {}
    start = None if rules.grow is None else rules.grow.start
    shares = _shares(rules, parameters, count)
    for paths in _pools(rules, parameters):

        def decided(own: Parameters) -> States:
            begun = {k: _begun(rules, p) for k, p in own.items()}
            if start is None:
                return _renewed(rules, begun, count, own, shares, grown=False)
            # What decides the first masks is not needed again.
            other = rules._replace(score=start)
            at_start = {
                k: dataclasses.replace(begun[k], kept=_kept(start, p)) for k, p in own.items()
            }
            made = _renewed(other, at_start, count, own, shares, grown=False)
            return {k: dataclasses.replace(s, kept=begun[k].kept) for k, s in made.items()}

        made = on_auto_axes(decided, {k: parameters[k] for k in paths})
        # One pool after the other, so that what is needed on the way is there for one at a time.
        traced = any(map(is_traced, jax.tree.leaves(made)))
        states |= made if traced else jax.block_until_ready(made)
    return {k: Decision(states[k]) for k in parameters}


def later(
    rules: Rules, decisions: Mapping[str, Decision], count: jax.Array, parameters: Parameters
) -> dict[str, Decision]:
    """The decisions of ``update``: what accumulates moves on, masks are renewed when due."""
    states = {k: _advanced(rules, d.state, parameters[k]) for k, d in decisions.items()}
    shares = _shares(rules, parameters, count)
    for paths in _pools(rules, parameters):
        own, around = {k: states[k] for k in paths}, {k: parameters[k] for k in paths}
        if rules.schedule is None:
            states |= _renewed(rules, own, count, around, shares)
            continue

        def once(carry, own=own, around=around):
            due, found = carry
            now = {k: dataclasses.replace(own[k], **found[k]) for k in own}
            return jnp.zeros_like(due), _searched(_renewed(rules, now, count, around, shares))

        # A loop of at most one turn, since a branch that keeps the mask would copy it.
        carry = (rules.schedule.due(count), _searched(own))
        found = lax.while_loop(lambda carry: carry[0], once, carry)[1]
        states |= {k: dataclasses.replace(own[k], **found[k]) for k in own}
    return {k: Decision(state) for k, state in states.items()}


def _searched(states: States) -> dict[str, dict[str, Any]]:
    return {k: {"mask": s.mask, "threshold": s.threshold} for k, s in states.items()}


def _pools(rules: Rules, parameters: Parameters) -> list[list[str]]:
    """Which parameters are decided together."""
    together = rules.scope == "global" and rules.schedule is not None and rules.pattern.n_m is None
    return [list(parameters)] if together else [[path] for path in parameters]


def _shares(rules: Rules, parameters: Parameters, count: Any) -> dict[str, Any]:
    """Path -> sparsity, of each parameter."""
    if rules.schedule is None:
        return {}
    sparsity = rules.schedule.sparsity(count)
    if rules.distribution is None:
        return dict.fromkeys(parameters, sparsity)
    return rules.distribution({k: _size(p) for k, p in parameters.items()}, sparsity)


def _size(parameter: Parameter) -> Size:
    shape = tuple(parameter.value.shape)
    apart = {d + len(shape) for d in parameter.layout.stack}
    own = tuple(n for d, n in enumerate(shape) if d not in apart)
    return Size(own, math.prod(shape[d] for d in apart))


def _begun(rules: Rules, parameter: Parameter) -> PrunedState:
    """The state without a mask."""
    kept = _kept(rules.score, parameter)
    growing = None if rules.grow is None else _kept(rules.grow.score, parameter)
    n_m = rules.pattern.n_m
    axis = None if n_m is None else parameter.layout.group_axis
    flags = (rules.straight_through, rules.zero)
    return PrunedState(None, None, kept, growing, n_m, axis, leading_stack(parameter), *flags)


def _kept(score: Score, parameter: Parameter) -> Any:
    """The arrays of a score, once it is known to work."""
    try:
        # Arrays of its own, which a step may donate.
        kept = jax.tree.map(jnp.copy, score.keep(parameter))
        own = lambda value: parameter._replace(value=value, grad=_like(parameter))
        made = jax.eval_shape(lambda value: score.score(own(value), kept), parameter.value)
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
    return kept


def _like(parameter: Parameter) -> jax.Array:
    return jnp.zeros(parameter.value.shape, parameter.value.dtype)


def _advanced(rules: Rules, state: PrunedState, parameter: Parameter) -> PrunedState:
    """The state with what scores accumulate at every update."""
    if rules.score.advance is not None:
        state = dataclasses.replace(state, kept=rules.score.advance(parameter, state.kept))
    if rules.grow is not None and rules.grow.score.advance is not None:
        growing = rules.grow.score.advance(parameter, state.growing)
        state = dataclasses.replace(state, growing=growing)
    return state


def _scores(score: Score, parameter: Parameter, kept: Any, units: Units, pattern: Pattern) -> Any:
    """Scores of units, of which the sign does not count."""
    # The search ignores signs; absolute values would be one more array of this size.
    fast = is_magnitude(score) and pattern.kind in ("entries", "n:m")
    scores = parameter.dense() if fast else score.score(parameter, kept)
    if parameter.keep is not None and not score.signed and pattern.kind != "entries":
        scores = jnp.where(parameter.keep, scores, 0)
    scores = units.gather(scores)
    if score.signed:
        scores = nonnegative(scores)
    if parameter.keep is not None and pattern.kind == "entries":
        scores = among(scores, units.gather(parameter.keep))
    return scores


def _renewed(
    rules: Rules,
    states: States,
    count: jax.Array,
    parameters: Parameters,
    shares: dict[str, Any],
    grown: bool = True,
) -> States:
    """The masks of parameters that are decided together."""
    if rules.pattern.n_m is not None:
        return {k: _in_groups(rules, s, parameters[k], shares[k]) for k, s in states.items()}
    units = {k: units_of(p, rules.pattern, rules.scope, rules.stack) for k, p in parameters.items()}
    scores = {
        k: _scores(rules.score, p, states[k].kept, units[k], rules.pattern)
        for k, p in parameters.items()
    }
    if rules.threshold is not None:
        limit = rules.threshold(count)
        masks, threshold = {k: jnp.abs(s) >= limit for k, s in scores.items()}, None
    elif rules.grow is None or not grown:
        keep = keep_count(_total(scores, units), shares[next(iter(parameters))])
        masks, threshold = _largest(scores, keep, units, states)
    else:
        keep = keep_count(_total(scores, units), shares[next(iter(parameters))])
        masks, threshold = _exchanged(
            rules, rules.grow, scores, keep, count, units, states, parameters
        )
    new = {}
    for k, p in parameters.items():
        mask = _within(units[k].spread(masks[k]), p)
        own = None if threshold is None else jnp.copy(threshold)
        new[k] = dataclasses.replace(states[k], mask=mask, threshold=own)
    return new


def _in_groups(rules: Rules, state: PrunedState, parameter: Parameter, share: Any) -> PrunedState:
    """An n:m mask, once any sparsity is asked for."""
    assert state.pattern is not None and state.axis is not None
    same = Units(lambda x: x, lambda mask: mask, 0)
    scores = _scores(rules.score, parameter, state.kept, same, rules.pattern)
    mask = n_m_mask(scores, *state.pattern, state.axis) | (share <= 0)
    return dataclasses.replace(state, mask=_within(mask, parameter))


def _within(mask: jax.Array, parameter: Parameter) -> jax.Array:
    """The mask without entries that earlier elements fixed at zero."""
    return mask if parameter.keep is None else mask & parameter.keep


def _total(scores: dict[str, jax.Array], units: dict[str, Units]) -> int:
    """How many units a pool has."""
    return sum(math.prod(x.shape[units[k].pools :]) for k, x in scores.items())


def _largest(
    scores: dict[str, jax.Array], keep: Any, units: dict[str, Units], states: States | None
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
    by = {
        k: _scores(grow.score, p, states[k].growing, units[k], rules.pattern)
        for k, p in parameters.items()
    }
    new, _ = _largest({k: among(s, free[k]) for k, s in by.items()}, grown, units, None)
    return {k: stay[k] | new[k] for k in stay}, threshold
