"""Pruning by score, along a schedule, to a pattern."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.compression import (
    Compression,
    Method,
    Parameter,
    compression_of,
    made,
    spelled,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.sparsity.distributions import Distribution
from jaxopt_compress.sparsity.grow import Grow
from jaxopt_compress.sparsity.masks import first, later
from jaxopt_compress.sparsity.rules import Rules
from jaxopt_compress.sparsity.schedule import Schedule, as_schedule
from jaxopt_compress.sparsity.schedules import constant
from jaxopt_compress.sparsity.score import Score, as_score
from jaxopt_compress.sparsity.search import Parameters
from jaxopt_compress.sparsity.state import check_prunable
from jaxopt_compress.sparsity.units import SCOPES, Pattern, read_pattern
from jaxopt_compress.tree import Where
from jaxopt_compress.typing import Leaf

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
    **dict.fromkeys(("block_size", "block_shape"), "write pattern='block:16x16'"),
    **dict.fromkeys(("global_pruning", "is_global"), "write scope='global'"),
    **dict.fromkeys(
        ("drop_fraction", "drop_fraction_fn"), "write grow=jaxopt_compress.grow.by_gradient(0.3)"
    ),
}


@answers(_ELSEWHERE)
def prune(
    score: Score | Callable[[Parameter], jax.Array],
    schedule: Schedule | Callable[[Any], Any] | None = None,
    pattern: str | None = None,
    where: Where = None,
    *,
    threshold: float | Callable[[Any], Any] | None = None,
    scope: str | None = None,
    distribution: Distribution | None = None,
    grow: Grow | None = None,
    backward: str = "masked",
    pruned: str | None = None,
    stack: int = 0,
) -> Compression:
    """Sets the entries with the lowest scores to zero, and stores only the others.

    Exactly ``size - round(size * sparsity)`` entries stay of those that are compared with each
    other; among equal scores the ones with the lower row-major index, and of the parameter that
    comes first. Masks are decided in ``init`` at step 0 and renewed by ``update`` at the steps
    where the schedule is due, from the parameters passed in; entries that were pruned can come
    back. In a chain after another ``prune`` only entries that it kept are kept.

    Args:
        score: Which entries are kept: one of `jaxopt_compress.scores`, or a function
            ``(parameter) -> scores``, of the shape of ``parameter.value`` and at least 0.
        schedule: One of `jaxopt_compress.schedules`, or any function of the step that gives the
            sparsity, such as a schedule of optax. May be left out with an n:m pattern.
        pattern: What is kept or pruned together. None or ``"unstructured"``: single entries.
            ``"n:m"``, such as ``"2:4"``: of each ``m`` consecutive entries along the contracted
            axis the ``n`` with the highest scores stay (of a last, shorter group as many, if it has
            them), from the first step on at which the schedule asks for any sparsity, and the
            schedule has to end at ``1 - n / m``. ``"2:4t"``: transposable, the same along the
            outputs too. ``"block:16x16"``: blocks of so many contracted by so many output entries.
            ``"channels"``: outputs. ``"inputs"``: entries of the last contracted axis. The score
            of the last three is the mean over their entries, and sparsity counts them, not entries.
        where: Which parameters; by default the floating ones of rank 2 and more, and where uses are
            given only those with a use.
        threshold: In the place of a schedule: entries with at least this score stay. A number, or a
            function of the step; masks are then renewed by each update. Scores that accumulate
            gradients prune nothing in ``init``.
        scope: What is compared with each other: ``"leaf"``, the entries of a parameter, and of each
            entry of its stack; ``"output"``, those of one output; ``"global"``, those of all
            parameters. By default what the score says, which is ``"leaf"`` for most.
        distribution: How the scope ``"leaf"`` spreads the sparsity of the schedule over parameters,
            one of `jaxopt_compress.distributions`; by default all have the same. A recipe of
            several ``prune`` gives each its own.
        grow: How kept entries are exchanged for pruned ones at each due step after the first, one
            of `jaxopt_compress.grow`.
        backward: ``"masked"``: the derivative at a pruned entry is 0. ``"straight_through"``: it is
            that at the view, so that pruned entries train on.
        pruned: What training does with pruned entries of parameters. ``"stay"``: nothing, so that
            they come back with the values that they had; ``"zero"``: `compressed_training` sets
            them, and their moments in the optimizer's state, to 0 at each update, so that they
            come back as 0. By default ``"zero"`` with ``grow``, and ``"stay"`` without.
        stack: How many leading axes of each are a stack of parameters of their own, whatever uses
            say of them, such as the members of an ensemble under `jax.vmap`; also in the scope
            ``"global"``.

    Returns:
        A `Compression` that stores `SparseArray`.

    Raises:
        TypeError: ``score`` or ``schedule`` is none.
        ValueError: Arguments that cannot be read, or that contradict each other.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> c = jc.prune(jc.scores.magnitude(), pattern="2:4")
        >>> jc.compress({"w": jnp.arange(1.0, 9.0).reshape(8, 1)}, c)["w"].materialize()[:, 0]
        Array([0., 0., 3., 4., 0., 0., 7., 8.], dtype=float32)
        >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0, 4.0]])}
        >>> c = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), scope="global")
        >>> jc.materialize(jc.compress(params, c))["a"]
        Array([[0., 0.]], dtype=float32)

    References:
        Zhu and Gupta, 2017, To Prune, or Not to Prune. Mishra et al., 2021, Accelerating Sparse
        Deep Neural Networks.
    """
    by, form = as_score(score), read_pattern(pattern)
    steps = _schedule(schedule, threshold, form, by.signed)
    _check_together(form, scope, distribution, grow, threshold)
    wide = scope or ("leaf" if form.kind != "entries" or distribution else by.scope)
    limit = threshold if callable(threshold) or threshold is None else lambda count: threshold
    passes = _one_of("backward", backward, ("masked", "straight_through")) == "straight_through"
    chosen = pruned or ("stay" if grow is None else "zero")
    zero = _one_of("pruned", chosen, ("stay", "zero")) == "zero"
    if passes and zero:
        raise ValueError("backward='straight_through' trains pruned entries, so they stay")
    rules = Rules(by, steps, limit, form, wide, distribution, grow, stack, passes, zero)

    method = Method(
        lambda parameters: _check(rules, parameters),
        lambda parameters: first(rules, parameters),
        lambda decisions, count, parameters: later(rules, decisions, count, parameters),
    )
    asked = {"pattern": pattern, "where": where, "stack": stack or None}
    by_what = [made(x) for x in (by, schedule) if x is not None]
    call = spelled("prune", *by_what, threshold=threshold, scope=scope, pruned=pruned, **asked)
    compression = compression_of(method, where, stack=stack, asked=spelled("prune", **asked))
    return compression._replace(call=call)


def _schedule(schedule: Any, threshold: Any, pattern: Pattern, signed: bool) -> Schedule | None:
    """The schedule; None with a threshold.

    Raises:
        TypeError: It is none.
        ValueError: Both or neither are given; or the schedule contradicts an n:m pattern.
    """
    if threshold is not None:
        if schedule is not None:
            raise ValueError(
                "schedule= says how many entries stay, threshold= which; give one of them"
            )
        if not callable(threshold) and not (threshold >= 0 or signed):
            raise ValueError(f"threshold={threshold!r}; it is a score, at least 0")
        return None
    ends = 1 - pattern.sizes[0] / pattern.sizes[1] if pattern.n_m else None
    if schedule is None and ends is None:
        raise ValueError(
            "prune needs a schedule, such as schedules.constant(0.9), or threshold=, a score"
        )
    found = as_schedule(constant(ends) if schedule is None else schedule)  # pyright: ignore
    final = float(found.sparsity(jnp.int32(2**31 - 1)))
    if ends is not None and abs(final - ends) > 1e-6:
        n_m = "{}:{}".format(*pattern.sizes)
        raise ValueError(
            f"pattern={n_m!r} prunes {ends:.6g} of the entries, but the schedule ends at "
            f"{final:.6g}; use schedules.constant({ends:.6g}) or a schedule that ends there"
        )
    return found


def _check_together(
    pattern: Pattern,
    scope: str | None,
    distribution: Distribution | None,
    grow: Grow | None,
    threshold: Any,
) -> None:
    """Refuses arguments that contradict each other."""
    if scope is not None:
        _one_of("scope", scope, SCOPES)
    if pattern.n_m is not None:
        asked = {"scope": scope, "distribution": distribution, "threshold": threshold}
        for name, value in asked.items():
            if value is not None:
                raise ValueError(
                    f"{name}= with an n:m pattern, which says how many entries of each group stay: "
                    "leave one of them out"
                )
        if pattern.transposable and grow is not None:
            raise ValueError(
                "grow= with a transposable pattern, whose blocks have no entry to exchange: take "
                "pattern='{}:{}'".format(*pattern.sizes)
            )
    elif scope == "output" and pattern.kind != "entries":
        raise ValueError(
            f"scope='output' with pattern={pattern.kind!r}: an output is no part of one output; "
            "take 'leaf' or 'global'"
        )
    if distribution is not None and scope not in (None, "leaf"):
        raise ValueError(
            f"distribution= with scope={scope!r}: a distribution says the sparsity of each "
            "parameter, which is for scope='leaf'"
        )
    if grow is not None and not isinstance(grow, Grow):
        raise TypeError(f"grow={grow!r}; jaxopt_compress.grow.by_gradient(0.3) is one")
    if threshold is not None and (grow is not None or distribution is not None):
        raise ValueError("threshold= says which entries stay: leave grow= and distribution= out")


def _one_of(name: str, value: Leaf, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{name}={value!r}; there are {', '.join(map(repr, known))}")
    return value


def _check(rules: Rules, parameters: Parameters) -> None:
    """Refuses parameters that cannot be pruned so."""
    for parameter in parameters.values():
        _check_one(rules, parameter)
    starts = rules.score if rules.grow is None else rules.grow.start or rules.score
    if rules.schedule is None or not starts.begins:
        return
    now = rules.schedule.sparsity(jnp.int32(0))
    if not is_traced(now) and float(now) > 0:
        raise ValueError(
            f"the schedule prunes {float(now):.6g} at step 0, and the score accumulates gradients "
            f"of updates: begin at step {starts.begins} or later, such as "
            f"schedules.one_shot({float(now):.6g}, step=100), or score by a loss, such as "
            "scores.given(scores.snip(loss, params, batch))"
        )


def _check_one(rules: Rules, parameter: Parameter) -> None:
    layout, kind = parameter.layout, rules.pattern.kind
    check_prunable(parameter)
    if rules.pattern.transposable and layout.group_axis is not None:
        length, m = parameter.value.shape[layout.group_axis], rules.pattern.sizes[1]
        if length % m and len(layout.contracting) > 1:
            raise ValueError(
                f"pattern={_named(rules.pattern)!r} does not divide axis {layout.group_axis} of "
                f"{parameter.describe()}, and the axes before it are summed over too: take "
                f"{_named(rules.pattern)[:-1]!r}"
            )
    if layout.group_axis is None:
        if kind in ("n:m", "inputs", "block"):
            raise ValueError(
                f"{parameter.describe()} has no contracted axis for the pattern "
                f"{_named(rules.pattern)!r}; prune it unstructured"
            )
        if rules.scope == "output":
            raise ValueError(
                f"{parameter.describe()} has no contracted axis, so that each output is one entry; "
                "prune it with scope='leaf'"
            )


def _named(pattern: Pattern) -> str:
    between = {"n:m": "{}:{}", "block": "block:{}x{}"}.get(pattern.kind, pattern.kind)
    return between.format(*pattern.sizes) + "t" * pattern.transposable
