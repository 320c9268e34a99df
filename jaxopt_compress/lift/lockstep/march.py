"""Walking through a staged function with all batches, and deciding parameters as they are met."""

import warnings
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, JaxprEqn, Literal, Var

from jaxopt_compress.arrays import materialize
from jaxopt_compress.arrays.fields import is_key
from jaxopt_compress.lift import _compat
from jaxopt_compress.lift.interpreter import CONTROL_RULES
from jaxopt_compress.lift.lockstep.meet import Gauge, look
from jaxopt_compress.lift.lockstep.pieces import Pieces
from jaxopt_compress.lift.lockstep.values import (
    Each,
    Index,
    Weight,
    computed,
    derived,
    present,
    stacked,
)
from jaxopt_compress.lift.observe.measures import Measure
from jaxopt_compress.lift.observe.probe import Axis, Member
from jaxopt_compress.lift.observe.statistics import Statistics
from jaxopt_compress.lift.segments import last_uses, read_later
from jaxopt_compress.typing import Leaf, Value

Stats = Callable[[], list[Statistics]]
Decide = Callable[[str, Index, jax.Array, Stats], Leaf]

_ENTERED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}

# Primitives by which data choose entries of a parameter.
_LOOKUPS = ("gather", "dynamic_slice")


class WholeWarning(UserWarning):
    """Control flow was calibrated as a whole: its parameters were decided together."""


def march(
    closed: ClosedJaxpr,
    operands: Sequence[Value],
    summed: Collection[str],
    decide: Decide,
    batches: tuple[int, int],
    measures: Sequence[Measure],
    offload: bool = False,
) -> tuple[list[Value], Pieces]:
    """Runs a staged function on several batches in lockstep, and decides parameters on the way.

    Args:
        closed: The jaxpr of the function.
        operands: For each of its arguments: an `Each` with one value per batch; ``(path, value)``
            for a parameter to decide; or an array.
        summed: The paths of those that some product sums over.
        decide: ``decide(path, index, w, stats)``: the compressed form of ``w``, a parameter, or the
            entry ``index`` of its leading stack axes with those axes of size 1. ``stats()`` gives
            its `Statistics`, empty where nothing was measured. Called once for each, when the
            parameter is first met by a product that sums over it; from then on the function runs
            with the materialized result. A parameter that no product sums over is decided before
            its first use.
        batches: How many batches are measured, and how many more only attach held-out statistics.
        measures: What is measured.
        offload: Whether values that wait are kept on the host.

    Returns:
        The results of the function, `Each` where they depend on batches; and what was compiled.
    """
    walk = _March(summed, decide, batches, measures, offload)
    args = [walk.parameter(*x) if isinstance(x, tuple) else x for x in operands]
    return walk.run(closed, args), walk.pieces


class _March:
    def __init__(self, summed, decide, batches, measures, offload) -> None:
        self.summed, self.decide, self.offload = summed, decide, offload
        self.count = sum(batches)
        self.pieces = Pieces()
        self.gauge = Gauge(self.pieces, measures, batches)
        self.store: dict[str, Value] = {}
        self.decided: set[tuple[str, Index]] = set()

    def parameter(self, path: str, value: jax.Array) -> Weight:
        self.store[path] = value
        shape = tuple(value.shape)
        axes = tuple(Axis((d,)) for d in range(-len(shape), 0))
        now = lambda batch: self.store[path]
        return Weight(now, {path: ()}, (Member(path, shape, axes),), len(shape))

    def run(self, closed: Jaxpr | ClosedJaxpr, args: Sequence[Value]) -> list[Value]:
        """Walks through a jaxpr."""
        jaxpr, consts = _compat.parts(closed)
        env: dict[Var, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        read = lambda v: v.val if isinstance(v, Literal) else env[v]
        last, origin = last_uses(jaxpr), _compat.part_origin(jaxpr)
        waiting: list[JaxprEqn] = []
        for i, eqn in enumerate(jaxpr.eqns):
            known = [v.val if isinstance(v, Literal) else env.get(v) for v in eqn.invars]
            if not any(isinstance(x, Weight) for x in known):
                waiting.append(eqn)
                continue
            computed = all(isinstance(v, Literal) or v in env for v in eqn.invars)
            batched = not computed or any(isinstance(x, Each) for x in known)
            name = eqn.primitive.name
            if not batched and name not in CONTROL_RULES:
                _, members = look(eqn, known)
                env.update(zip(eqn.outvars, derived(eqn, known, members), strict=True))
                continue
            self._flush(waiting, env, last, i, origin)
            waiting = []
            operands = [read(v) for v in eqn.invars]
            if name in _LOOKUPS and (members := look(eqn, operands)[1])[0]:
                # Products meet what was found; it is found anew once the parameter is decided.
                self._meet(eqn, operands, origin)
                env.update(zip(eqn.outvars, derived(eqn, operands, members), strict=True))
            elif name in _ENTERED:
                inner = eqn.params.get(_ENTERED[name], eqn.params.get("jaxpr"))
                env.update(zip(eqn.outvars, self.run(inner, operands), strict=True))
            elif name == "scan" and (steps := self._steps(eqn, operands)) is not None:
                env.update(zip(eqn.outvars, self._scan(eqn, operands, steps), strict=True))
            else:
                if name in CONTROL_RULES:
                    self._whole(eqn, operands, origin)
                else:
                    self._meet(eqn, operands, origin)
                waiting.append(eqn)
        self._flush(waiting, env, last, len(jaxpr.eqns), origin)
        return [read(v) for v in jaxpr.outvars]

    def _flush(
        self,
        run: Sequence[JaxprEqn],
        env: dict[Var, Value],
        last: dict[Var, int],
        now: int,
        origin: DebugInfo,
    ) -> None:
        """Computes what waits, and forgets what nothing reads any more."""
        if run:
            outputs = read_later(run, last, now)
            fn, read = self.pieces.of(run, outputs, origin)
            values = [env[v] for v in read]
            fixed = [computed(x, self.count) for x in values]
            if any(isinstance(x, Each) for x in fixed):
                each = [self._kept(fn(*(present(x, b) for x in fixed))) for b in range(self.count)]
                env.update({v: Each([e[i] for e in each]) for i, v in enumerate(outputs)})
            else:
                env.update(zip(outputs, fn(*fixed), strict=True))
        for v in [v for v, x in env.items() if isinstance(x, Each) and last.get(v, -1) < now]:
            del env[v]

    def _kept(self, results: Sequence[Value]) -> list[Value]:
        if not self.offload:
            return list(results)
        return [x if is_key(x) else np.asarray(x) for x in results]

    def _meet(self, eqn: JaxprEqn, operands: Sequence[Value], origin: DebugInfo) -> None:
        """Decides what an equation meets for the first time."""
        met, _ = look(eqn, operands)
        open_ = {path for path in met if not self._is_decided(path, operands)}
        if open_:
            self._settle(open_, operands, self.gauge.statistics(eqn, operands, origin))
        # Other uses, such as a lookup, wait for the product that sums over the parameter, if any.
        rest = {p for x in operands if isinstance(x, Weight) for p in x.bases}
        rest = {p for p in rest - set(self.summed) if not self._is_decided(p, operands)}
        self._settle(rest, operands, lambda path: [])

    def _whole(self, eqn: JaxprEqn, operands: Sequence[Value], origin: DebugInfo) -> None:
        """Decides all that meets control flow that is not walked."""
        paths = {p for x in operands if isinstance(x, Weight) for p in x.bases}
        open_ = {p for p in paths if not self._is_decided(p, operands)}
        if not open_:
            return
        warnings.warn(
            f"{eqn.primitive.name!r} is calibrated as a whole, at {_compat.source_line(eqn)}: "
            f"{', '.join(sorted(open_))} are decided together, from what they meet before any of "
            "them is compressed",
            WholeWarning,
            stacklevel=2,
        )
        self._settle(open_, operands, self.gauge.statistics(eqn, operands, origin))

    def _is_decided(self, path: str, operands: Sequence[Value]) -> bool:
        return (path, self._index(path, operands)) in self.decided

    def _index(self, path: str, operands: Sequence[Value]) -> Index:
        return next(x.bases[path] for x in operands if isinstance(x, Weight) and path in x.bases)

    def _settle(
        self,
        paths: Collection[str],
        operands: Sequence[Value],
        stats: Callable[[str], list[Statistics]],
    ) -> None:
        for path in sorted(paths):
            index = self._index(path, operands)
            lead = (np.newaxis,) * len(index)
            alone = lambda x, lead=lead: x[lead]
            seen = lambda path=path, alone=alone: jax.tree.map(alone, stats(path))
            whole = self.store[path]
            leaf = self.decide(path, index, whole[index][lead], seen)
            dense = materialize(leaf).reshape(whole[index].shape)
            self.store[path] = dense if not index else whole.at[index].set(dense)
            self.decided.add((path, index))

    def _steps(self, eqn: JaxprEqn, operands: Sequence[Value]) -> list[list[Value]] | None:
        """The scanned operands of each iteration; None if the scan cannot be walked."""
        consts, carry, xs = _compat.scan_split(eqn.params, list(operands))
        shared = [x for x in consts if isinstance(x, Weight)]
        paths = [(x, p) for x in shared for p in x.bases if p in self.summed]
        waits = any(not self._is_decided(p, [x]) for x, p in paths)
        if waits or any(isinstance(x, Weight) for x in carry):
            return None
        length = eqn.params["length"]
        steps = [[_cut(x, t) for x in xs] for t in range(length)]
        return None if any(x is None for step in steps for x in step) else steps

    def _scan(
        self, eqn: JaxprEqn, operands: Sequence[Value], steps: Sequence[Sequence[Value]]
    ) -> list[Value]:
        """Walks through a scan, iteration by iteration."""
        consts, carry, _ = _compat.scan_split(eqn.params, list(operands))
        n = len(carry)
        ys: list[list[Value]] = []
        order = range(len(steps))
        for t in reversed(order) if eqn.params["reverse"] else order:
            results = self.run(eqn.params["jaxpr"], [*consts, *carry, *steps[t]])
            results = [computed(x, self.count) for x in results]
            carry, ys = results[:n], [*ys, results[n:]]
        if eqn.params["reverse"]:
            ys = ys[::-1]
        if not ys:
            types = [_compat.type_of(v) for v in eqn.outvars[n:]]
            return [*carry, *(jnp.zeros(t.shape, t.dtype) for t in types)]
        return [*carry, *(stacked(column, self.count) for column in zip(*ys, strict=True))]


def _cut(x: Value, t: int) -> Value:
    if isinstance(x, Weight):
        return x.layer(t)
    return Each([v[t] for v in x.values]) if isinstance(x, Each) else x[t]
