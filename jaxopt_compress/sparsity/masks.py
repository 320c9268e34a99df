"""Deciding masks: at first and at each update."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.compression import Decision, NeedsStats, Parameter
from jaxopt_compress.sparsity.distributions import Size
from jaxopt_compress.sparsity.rules import Rules
from jaxopt_compress.sparsity.score import Score
from jaxopt_compress.sparsity.search import Parameters, States, renewed
from jaxopt_compress.sparsity.state import PrunedState, leading_stack
from jaxopt_compress.tree.meshes import on_auto_axes
from jaxopt_compress.typing import Leaf, PyTree


def first(rules: Rules, parameters: Parameters) -> dict[str, Decision]:
    """The decisions of ``init``: the masks of step 0."""
    count, states = jnp.zeros((), jnp.int32), {}
    start = None if rules.grow is None else rules.grow.start
    shares = _shares(rules, {k: _size(p, p.flops) for k, p in parameters.items()}, count)
    for paths in _pools(rules, parameters):

        def decided(own: Parameters) -> States:
            begun = {k: _begun(rules, p) for k, p in own.items()}
            if start is None:
                return renewed(rules, begun, count, own, shares, grown=False)
            # What decides the first masks is not needed again.
            other = rules._replace(score=start)
            at_start = {
                k: dataclasses.replace(begun[k], kept=_kept(start, p)) for k, p in own.items()
            }
            made = renewed(other, at_start, count, own, shares, grown=False)
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
    sizes = {k: _size(p, states[k].flops) for k, p in parameters.items()}
    shares = _shares(rules, sizes, count)
    for paths in _pools(rules, parameters):
        own, around = {k: states[k] for k in paths}, {k: parameters[k] for k in paths}
        if rules.schedule is None:
            states |= renewed(rules, own, count, around, shares)
            continue

        def once(carry, own=own, around=around):
            due, found = carry
            now = {k: dataclasses.replace(own[k], **found[k]) for k in own}
            return jnp.zeros_like(due), _searched(renewed(rules, now, count, around, shares))

        # A loop of at most one turn, since a branch that keeps the mask would copy it.
        carry = (rules.schedule.due(count), _searched(own))
        found = lax.while_loop(lambda carry: carry[0], once, carry)[1]
        states |= {k: dataclasses.replace(own[k], **found[k]) for k in own}
    return {k: Decision(state) for k, state in states.items()}


def _searched(states: States) -> dict[str, dict[str, Leaf]]:
    return {k: {"mask": s.mask, "threshold": s.threshold} for k, s in states.items()}


def _pools(rules: Rules, parameters: Parameters) -> list[list[str]]:
    """Which parameters are decided together."""
    together = rules.scope == "global" and rules.schedule is not None and rules.pattern.n_m is None
    return [list(parameters)] if together else [[path] for path in parameters]


def _shares(rules: Rules, sizes: Mapping[str, Size], count: jax.Array) -> dict[str, Any]:
    """Path -> sparsity, of each parameter."""
    if rules.schedule is None:
        return {}
    sparsity = rules.schedule.sparsity(count)
    if rules.distribution is None:
        return dict.fromkeys(sizes, sparsity)
    return rules.distribution(sizes, sparsity)


def _size(parameter: Parameter, flops: int | None) -> Size:
    shape = tuple(parameter.value.shape)
    apart = {d + len(shape) for d in parameter.layout.stack}
    own = tuple(n for d, n in enumerate(shape) if d not in apart)
    return Size(own, math.prod(shape[d] for d in apart), flops)


def _begun(rules: Rules, parameter: Parameter) -> PrunedState:
    """The state without a mask."""
    kept = _kept(rules.score, parameter)
    growing = None if rules.grow is None else _kept(rules.grow.score, parameter)
    n_m = rules.pattern.n_m
    axis = None if n_m is None else parameter.layout.group_axis
    # Updates see no uses.
    flops = None if rules.distribution is None else parameter.flops
    flags = (rules.straight_through, rules.zero, flops)
    return PrunedState(None, None, kept, growing, n_m, axis, leading_stack(parameter), *flags)


def _kept(score: Score, parameter: Parameter) -> PyTree:
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
