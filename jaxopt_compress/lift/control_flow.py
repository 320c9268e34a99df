"""Control flow around compressed values, rebuilt through JAX's own functions.

A body is replayed inside `jax.lax.scan`, `jax.checkpoint` and the like, so that compressed values
enter it as they are: a scan over stacked layers strips the leading axis of every field.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxopt_compress.lift import _compat
from jaxopt_compress.lift.interpreter import Call, Layer, Ref, control_rule, replay_jaxpr
from jaxopt_compress.lift.observe import tape as tapes
from jaxopt_compress.lift.views import NoView, stacked
from jaxopt_compress.typing import PyTree, Value


@control_rule("jit", "pjit", "closed_call", "core_call")
def _call(call: Call) -> list[Value]:
    """Replays the body in place; the shardings that the call asked for become constraints."""
    params = call.params
    n, m = len(call.operands), len(call.eqn.outvars)
    inputs = _constrain(call.operands, params.get("in_shardings", (None,) * n))
    jaxpr = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
    with jax.named_scope(params.get("name", "call")):
        results = replay_jaxpr(call.replay, jaxpr, inputs)
    return _constrain(results, params.get("out_shardings", (None,) * m))


def _constrain(values: Sequence[Value], shardings: Sequence[PyTree]) -> list[Value]:
    named = lambda s: isinstance(s, jax.sharding.NamedSharding)
    pin = lambda x, s: lax.with_sharding_constraint(x, s)
    return [
        pin(x, s) if named(s) and not isinstance(x, Ref) else x
        for x, s in zip(values, shardings, strict=True)
    ]


@control_rule("remat2", "checkpoint")
def _remat(call: Call) -> list[Value]:
    def body(*values):
        with tapes.collect(call.replay.tape) as seen:
            results = replay_jaxpr(call.replay, call.params["jaxpr"], values)
        return results, seen.values

    wrap = jax.checkpoint(
        body, prevent_cse=call.params["prevent_cse"], policy=call.params["policy"]
    )
    results, seen = wrap(*call.operands)
    tapes.absorb(call.replay.tape, seen)
    return results


@control_rule("scan")
def _scan(call: Call) -> list[Value]:
    """Scans with the fields of compressed values as constants or as scanned arrays.

    A compressed value that the body carries along unchanged is a constant; another one that is
    carried has to be dense.
    """
    params, tape = call.params, call.replay.tape
    consts, carry, xs = _compat.scan_split(params, call.operands)
    jaxpr, _ = _compat.parts(params["jaxpr"])
    carry_in = jaxpr.invars[len(consts) : len(consts) + len(carry)]
    kept = _unchanged(carry, carry_in, jaxpr.outvars)
    carry = dense_values(call, carry, kept)
    xs = [_stacked(call, x) for x in xs]
    moving = [x for i, x in enumerate(carry) if i not in kept]
    # Kernels read a layer inside the stack; as an operand it would be a copy.
    in_place = call.replay.pallas and any(isinstance(x, Ref) for x in xs)
    counted = jnp.arange(params["length"], dtype=jnp.int32) if in_place else None
    fields = [x.array if isinstance(x, Ref) else x for x in xs]

    def body(state, scanned):
        slices, index = scanned
        slices = [_layer_of(x, one, index) for x, one in zip(xs, slices, strict=True)]
        state = _merge(state, kept)
        with tapes.collect(tape, tapes.Loop("scan", params["length"], _paths(xs))) as seen:
            results = replay_jaxpr(call.replay, params["jaxpr"], [*consts, *state, *slices])
        results = dense_values(call, results, kept)
        out, ys = results[: len(carry)], results[len(carry) :]
        return [x for i, x in enumerate(out) if i not in kept], (ys, seen.values)

    state, (ys, seen) = lax.scan(
        body,
        moving,
        (fields, counted),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    tapes.absorb_scan(tape, seen, _paths(xs))
    return [*_merge(state, kept), *ys]


def _layer_of(x: Value, one: Value, index: jax.Array | None) -> Value:
    """A layer of the stack ``x``, which knows its place if ``index`` counts them.

    The place is that in an outer stack, if ``x`` is a part of one itself.
    """
    if not isinstance(x, Ref):
        return one
    if index is None:
        return x.replace(one)
    if x.layer is None:
        return Ref(one, x.path, Layer(x.array, index))
    before = x.layer.index * jax.tree.leaves(x.array)[0].shape[0]
    stack = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), x.layer.stack)
    return Ref(one, x.path, Layer(stack, before + index))


def _stacked(call: Call, x: Value) -> Value:
    """Makes the leading axis of a compressed value one that all of its fields have."""
    length = call.params["length"]
    if not isinstance(x, Ref) or all(f.shape[0] == length for f in jax.tree.leaves(x.array)):
        return x
    try:
        return x.replace(stacked(x.array, length))
    except NoView:
        return call.replay.fall_back(call.eqn, x)


@control_rule("while")
def _while(call: Call) -> list[Value]:
    """Loops with compressed values as constants of the loop."""
    params, replay = call.params, call.replay
    cut = params["cond_nconsts"]
    cond_consts, rest = call.operands[:cut], call.operands[cut:]
    body_consts, carry = rest[: params["body_nconsts"]], rest[params["body_nconsts"] :]
    jaxpr, _ = _compat.parts(params["body_jaxpr"])
    kept = _unchanged(carry, jaxpr.invars[len(body_consts) :], jaxpr.outvars)
    carry = dense_values(call, carry, kept)
    moving = [x for i, x in enumerate(carry) if i not in kept]

    def cond(state):
        inner = [*cond_consts, *_merge(state[0], kept)]
        with tapes.collect(replay.tape, tapes.Loop("while")) as seen:
            result = replay_jaxpr(replay, params["cond_jaxpr"], inner)[0]
        if seen.values:
            raise ValueError(
                f"{next(iter(seen.values)).path!r} is multiplied in the condition of a while loop, "
                "which returns a boolean only: compute it in the body of the loop, at "
                f"{replay.source_line(call.eqn)}"
            )
        return result

    def body(state):
        with tapes.collect(replay.tape, tapes.Loop("while")) as seen:
            inner = [*body_consts, *_merge(state[0], kept)]
            results = replay_jaxpr(replay, params["body_jaxpr"], inner)
        results = [x for i, x in enumerate(dense_values(call, results, kept)) if i not in kept]
        return results, tapes.fold(state[1], seen.values)

    state, seen = lax.while_loop(cond, body, (moving, tapes.empty(replay.tape, body, (moving, {}))))
    tapes.absorb(replay.tape, seen)
    return _merge(state, kept)


@control_rule("cond")
def _cond(call: Call) -> list[Value]:
    replay, (index, *operands) = (
        call.replay,
        dense_values(call, call.operands[:1]) + call.operands[1:],
    )

    def branch(jaxpr):
        def run(*values):
            # How often a branch runs depends on data, as for a loop of unknown length.
            with tapes.collect(replay.tape, tapes.Loop("cond")) as seen:
                results = replay_jaxpr(replay, jaxpr, values)
            return dense_values(call, results), seen.values

        return run

    branches = tapes.align(replay.tape, [branch(j) for j in call.params["branches"]], operands)
    results, seen = lax.switch(index, branches, *operands)
    tapes.absorb(replay.tape, seen)
    return results


@control_rule("shard_map")
def _shard_map(call: Call) -> list[Value]:
    """Splits each field of a compressed value as its dense form would be split."""
    params, tape = call.params, call.replay.tape

    def body(*values):
        with tapes.collect(tape, tapes.Loop("shard_map", 1)) as seen:
            results = replay_jaxpr(call.replay, params["jaxpr"], values)
        if seen.values and not params["check_vma"]:
            raise ValueError(
                "calibrate cannot tell which devices of a shard_map see different rows: build it "
                f"with check_vma=True, at {_compat.source_line(call.eqn)}"
            )
        return dense_values(call, results), tapes.absorb_manual(tape, seen.values)

    pairs = [_split(call, *each) for each in zip(call.operands, params["in_specs"], strict=True)]
    operands, specs = zip(*pairs, strict=True)
    results, seen = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=specs,
        out_specs=(list(params["out_specs"]), PartitionSpec()),
        axis_names=_compat.manual_axes(params),
        check_vma=params["check_vma"],
    )(*operands)
    tapes.absorb(tape, seen)
    return results


def _split(call: Call, x: Value, spec: PartitionSpec) -> tuple[Value, Value]:
    """An operand and the specs of its fields; dense where its stored form cannot be split."""
    if not isinstance(x, Ref):
        return x, spec
    mesh, x = call.params["mesh"], x.alone()
    whole = lambda own, field: NamedSharding(mesh, own).shard_shape(field.shape)
    try:
        specs = x.array.specs(spec)
        # Raises where a shard would cut a group, whose step is one entry.
        jax.tree.map(whole, specs, x.array, is_leaf=lambda s: isinstance(s, PartitionSpec))
        return x, x.replace(specs)
    except ValueError:
        return call.replay.fall_back(call.eqn, x), spec


def dense_values(call: Call, values: Sequence[Value], kept: Value = ()) -> list[Value]:
    """The values that leave or enter a body as arrays, but those at the positions ``kept``."""
    fall_back = call.replay.fall_back
    return [
        fall_back(call.eqn, x) if isinstance(x, Ref) and i not in kept else x
        for i, x in enumerate(values)
    ]


def _unchanged(carry: Sequence[Value], inputs: Sequence[Value], outputs: Sequence[PyTree]) -> dict:
    """The compressed values among ``carry`` that a body hands on as it got them, by position."""
    same = lambda i: outputs[i] is inputs[i]
    return {i: x for i, x in enumerate(carry) if isinstance(x, Ref) and same(i)}


def _merge(values: Sequence[Value], kept: dict[int, Value]) -> list[Value]:
    rest = iter(values)
    return [kept[i] if i in kept else next(rest) for i in range(len(values) + len(kept))]


def _paths(values: Sequence[Value]) -> frozenset[str]:
    """The paths of compressed values, and of all parameters that a probe is made of."""
    refs = [x for x in values if isinstance(x, Ref)]
    return frozenset(p for x in refs for p in getattr(x.array, "paths", (x.path,)))
