"""Solvers decide for each entry of a stack as if it were alone, wherever the stack comes from."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc

pytestmark = pytest.mark.filterwarnings("ignore::jaxopt_compress.AssumedLayout")

SIZES = (1.0, 30.0, 0.1)  # of the weights and, in another order, the inputs of entries
K, N, ROWS = 8, 6, 64


class Stack(NamedTuple):
    """A function of a stack, and the one that an entry has alone.

    Attributes:
        fn: ``fn(params, x)`` of all entries.
        entry: The function of one entry.
        w: The shape of the stack.
        x: The shape of all activations, entries first.
        lead: How many axes of the stack come first.
    """

    fn: Callable[..., Any]
    entry: Callable[..., Any]
    w: tuple[int, ...]
    x: tuple[int, ...]
    lead: int = 1


def product(equation):
    return lambda p, x: jnp.einsum(equation, x, p["w"])


def scanned(p, x):
    """Entry after entry, each with activations of its own."""
    return jax.lax.scan(lambda c, given: (c, given[1] @ given[0]), 0, (p["w"], x))[1]


def scanned_twice(p, x):
    step = lambda c, given: (c, scanned({"w": given[0]}, given[1]))
    return jax.lax.scan(step, 0, (p["w"], x))[1]


STACKS = {
    "experts": Stack(product("ebd,edf->ebf"), product("bd,df->bf"), (3, K, N), (3, ROWS, K)),
    "scanned": Stack(scanned, product("bd,df->bf"), (3, K, N), (3, ROWS, K)),
    "scanned twice": Stack(
        scanned_twice, product("bd,df->bf"), (1, 3, K, N), (1, 3, ROWS, K), lead=2
    ),
    "vmap": Stack(jax.vmap(product("bd,df->bf")), product("bd,df->bf"), (3, K, N), (3, ROWS, K)),
    "heads out": Stack(
        product("lbd,ldhk->lbhk"), product("bd,dhk->bhk"), (3, K, 2, N // 2), (3, ROWS, K)
    ),
    "heads in": Stack(
        product("lbhk,lhkd->lbd"), product("bhk,hkd->bd"), (3, 2, K // 2, N), (3, ROWS, 2, K // 2)
    ),
}
MSE = jc.bounds.mse()


def pruned():
    return jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5))


SOLVERS = {
    "gptq": lambda: jc.gptq("int3"),
    "gptq, groups": lambda: jc.gptq("int2", 4, symmetric=False),
    "auto_round": lambda: jc.auto_round("int3", steps=50),
    "auto_round, relaxed": lambda: jc.auto_round("int3", method="relaxed", steps=50),
    "awq": lambda: jc.awq("int3"),
    "hqq": lambda: jc.hqq("int3", symmetric=False),
    "smooth_quant": lambda: jc.smooth_quant(activations=jc.activations("int8", "calibrated")),
    "mse": lambda: jc.quantize("int3", bounds=MSE),
    "sparse_gpt": lambda: jc.sparse_gpt(0.5),
    "sparse_gpt, 2:4, gptq": lambda: jc.chain(jc.sparse_gpt(0.5, "2:4"), jc.gptq("int3")),
    "prune, reconstruct": lambda: jc.chain(pruned(), jc.reconstruct()),
    "prune, gptq": lambda: jc.chain(pruned(), jc.gptq("int3")),
    "low_rank_correction": lambda: jc.low_rank_correction(jc.quantize("int3"), 2, whiten=True),
}


@functools.cache
def measured(name):
    """The stack, its statistics, and those of each entry."""
    own = STACKS[name]
    rng = np.random.default_rng(7)
    lead = own.w[: own.lead]
    count = int(np.prod(lead))
    wide = lambda sizes, ndim: np.reshape(sizes, (*lead, *[1] * (ndim - own.lead)))
    w = rng.normal(size=own.w) * wide(SIZES, len(own.w))
    z = rng.normal(size=(count, ROWS, K)) @ rng.normal(size=(count, K, K))
    x = z.reshape(own.x) * wide(SIZES[::-1], len(own.x))
    params, x = {"w": jnp.asarray(w, jnp.float32)}, jnp.asarray(x, jnp.float32)
    return params, x, jc.uses(own.fn, params, x), jc.calibrate(own.fn, params, [x])


def entries(lead, tree):
    """The entries of all arrays of a tree."""
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[lead:]), tree)
    return [jax.tree.map(lambda a, i=i: a[i], flat) for i in range(len(SIZES))]


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", STACKS)
def test_entries_are_decided_as_if_each_were_alone(name, solver):
    own, (params, x, uses, stats) = STACKS[name], measured(name)
    c = SOLVERS[solver]()
    small = jc.compress(params, c, uses=uses, stats=stats)
    values = entries(own.lead, jc.materialize(small)["w"])
    seen = entries(own.lead, stats["w"][0])
    inputs, weights = entries(own.lead, x), entries(own.lead, params["w"])
    for value, known, x, w in zip(values, seen, inputs, weights, strict=True):
        alone = {"w": [dataclasses.replace(known, stack=())]}
        found = jc.uses(own.entry, {"w": w}, x)
        want = jc.compress({"w": w}, c, uses=found, stats=alone)
        a, b = value, jc.materialize(want)["w"]
        # Products of a batch are summed in another order; steps are far larger than that.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(b))))


@pytest.mark.slow
@pytest.mark.parametrize("solver", [s for s in SOLVERS if not s.startswith(("prune", "low"))])
def test_groups_of_a_convolution_are_decided_as_if_each_were_alone(solver):
    """Masks by magnitude and factors are those of the whole weight: it has no axis of groups."""
    groups, depth, columns = 3, 4, 2

    def convolved(p, x, groups=1):
        return jax.lax.conv_general_dilated(
            x,
            p["w"],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    rng = np.random.default_rng(3)
    fn = functools.partial(convolved, groups=groups)
    sizes = np.repeat(SIZES, depth)
    x = rng.normal(size=(4, 6, 6, 3)) @ rng.normal(size=(3, groups * depth)) * sizes
    w = rng.normal(size=(2, 2, depth, groups * columns)) * np.repeat(SIZES[::-1], columns)
    params, x = {"w": jnp.asarray(w, jnp.float32)}, jnp.asarray(x, jnp.float32)
    stats, c = jc.calibrate(fn, params, [x]), SOLVERS[solver]()
    small = jc.compress(params, c, uses=jc.uses(fn, params, x), stats=stats)
    for g in range(groups):
        one = {"w": params["w"][..., g * columns : (g + 1) * columns]}
        seen = x[..., g * depth : (g + 1) * depth]
        alone = {"w": [jax.tree.map(lambda a, g=g: a[g], stats["w"][0])]}
        want = jc.compress(one, c, uses=jc.uses(convolved, one, seen), stats=alone)
        a = jc.materialize(small)["w"][..., g * columns : (g + 1) * columns]
        b = jc.materialize(want)["w"]
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(b))))
