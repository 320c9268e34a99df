"""Solvers against the published algorithms, written anew in float64, and their laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_compress.numerics.formats import format_of
from jaxopt_compress.numerics.solvers.ada_round import ada_round
from jaxopt_compress.numerics.solvers.admm import admm
from jaxopt_compress.numerics.solvers.factor import conditioned
from jaxopt_compress.numerics.solvers.gptq import gptq
from jaxopt_compress.numerics.solvers.grids import Grid
from jaxopt_compress.numerics.solvers.half_quadratic import half_quadratic
from jaxopt_compress.numerics.solvers.sign_round import sign_round
from jaxopt_compress.numerics.solvers.sparse_gpt import sparse_gpt
from tests.numerics.problems import K, N, problem, reference_factor

INT4, INT3 = format_of("int4"), format_of("int3")


def steps(w, group, top):
    """A step per group of rows, one per entry."""
    high = np.abs(w).reshape(-1, group, w.shape[1]).max(1)
    return np.repeat(high / top, group, 0).astype(np.float32)


def reference_gptq(w, factor, scale, zero, low, high, keep=None):
    """One row after the other, each error taken from all later rows at once."""
    w, codes = w.astype(np.float64).copy(), np.zeros(w.shape)
    scale = scale.astype(np.float64)
    for i in range(len(w)):
        codes[i] = np.clip(np.round(w[i] / scale[i]) + zero[i], low, high)
        if keep is not None:
            codes[i] = np.where(keep[i], codes[i], zero[i])
        error = (w[i] - (codes[i] - zero[i]) * scale[i]) / factor[i, i]
        w[i:] -= np.outer(factor[i, i:], error)
    return codes


def reference_sparse_gpt(w, factor, counts, block):
    """Zeros of least cost in each block; ``counts(rows)``: how many of the block's entries."""
    w, mask = w.astype(np.float64).copy(), np.ones(w.shape, bool)
    for start in range(0, len(w), block):
        rows = slice(start, min(start + block, len(w)))
        for at in range(rows.start, rows.stop):
            chosen = counts(at, rows)
            if chosen is not None:
                part, number = chosen
                cost = (w[part] / np.diag(factor)[part, None]) ** 2
                if isinstance(number, tuple):
                    order = np.argsort(cost, 0, kind="stable")
                    np.put_along_axis(mask[part], order[: number[0]], False, 0)
                else:
                    flat = np.argsort(cost.reshape(-1), kind="stable")[:number]
                    mask[part] = (~np.isin(np.arange(cost.size), flat)).reshape(cost.shape)
            kept = np.where(mask[at], w[at], 0)
            error = (w[at] - kept) / factor[at, at]
            w[at] = kept
            w[at + 1 :] -= np.outer(factor[at, at + 1 :], error)
    return w, mask


@pytest.mark.fast("ordered", "asymmetric", "kept")
@pytest.mark.parametrize("kind", ["plain", "ordered", "asymmetric", "kept"])
def test_gptq_gives_the_codes_of_the_published_algorithm(kind):
    w, moment, _ = problem()
    zero, keep = np.zeros(w.shape), None
    scale = steps(w, 50, INT4.top)
    if kind == "asymmetric":
        w = w + 0.7
        span = w.reshape(-1, 50, N)
        low, high = np.minimum(span.min(1), 0), np.maximum(span.max(1), 0)
        scale = np.repeat((high - low) / 15, 50, 0).astype(np.float32)
        zero = np.repeat(np.clip(-8 - np.round(low / ((high - low) / 15)), -8, 7), 50, 0)
    if kind == "kept":
        keep = np.random.default_rng(1).random(w.shape) < 0.6
        w = np.where(keep, w, 0)
    order = np.arange(K)
    if kind == "ordered":
        order = np.argsort(-np.diag(moment), kind="stable")
    factor = reference_factor(moment[order][:, order])
    own = None if keep is None else keep[order]
    want = np.zeros(w.shape)
    want[order] = reference_gptq(w[order], factor, scale[order], zero[order], -8, 7, own)

    grid = Grid(
        jnp.asarray(scale),
        jnp.asarray(zero, jnp.int8) if kind == "asymmetric" else None,
        None if keep is None else jnp.asarray(keep),
    )
    got = gptq(jnp.asarray(w), jnp.asarray(moment), grid, INT4, act_order=kind == "ordered")
    # Codes differ where float32 brings a sum to the other side of a tie.
    assert np.mean(np.asarray(got) == want) > 0.999


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_sparse_gpt_gives_the_matrix_of_the_published_algorithm(pattern):
    w, moment, _ = problem()
    block = 128 if pattern is None else 4

    def counts(at, rows):
        if at != rows.start:
            return None
        if pattern is not None:
            return rows, (2, 4)
        done = lambda row: int(np.floor(row * N * 0.6 + 0.5))
        return rows, done(rows.stop) - done(rows.start)

    want, mask = reference_sparse_gpt(w, reference_factor(moment), counts, block)
    got, kept = sparse_gpt(
        jnp.asarray(w), jnp.asarray(moment), None, 0.6 if pattern is None else 0.5, pattern
    )
    same = np.asarray(kept) == mask
    assert np.mean(same) > 0.999
    # A different choice moves what comes after it in its column.
    columns = same.all(0)
    assert columns.mean() > 0.9
    np.testing.assert_allclose(np.asarray(got)[:, columns], want[:, columns], atol=2e-3)


def test_admm_nears_the_least_squares_of_each_column():
    """By numpy, on the entries of each column that are kept; a dead input changes nothing."""
    w, moment, _ = problem(k=40, n=6)
    moment = moment.copy()
    moment[3], moment[:, 3] = 0, 0
    mask = np.random.default_rng(1).random(w.shape) < 0.5
    got = np.asarray(admm(jnp.asarray(w), jnp.asarray(moment), jnp.asarray(mask), 400))
    alive = np.arange(40) != 3
    h = moment.astype(np.float64) / np.mean(np.diag(moment)[alive])
    h += 0.01 * np.eye(40)
    for j in range(6):
        own = mask[:, j] & alive
        want = np.linalg.solve(h[np.ix_(own, own)], h[own][:, alive] @ w[alive, j])
        np.testing.assert_allclose(got[own, j], want, atol=0.02 * np.abs(want).max())
    np.testing.assert_allclose(got[3], np.where(mask[3], w[3], 0), rtol=1e-6)
    assert not got[~mask].any()
    # Few rounds gain most of it, and none may lose.
    error = lambda v: np.einsum("kj,kl,lj->j", v - w, moment, v - w)
    one = np.asarray(admm(jnp.asarray(w), jnp.asarray(moment), jnp.asarray(mask), 1))
    assert (error(one) <= error(np.where(mask, w, 0)) * 1.001).all()


def test_sparse_gpt_keeps_exactly_as_many_as_asked_for():
    w, moment, _ = problem()
    _, mask = sparse_gpt(jnp.asarray(w), jnp.asarray(moment), None, 0.6)
    assert int(mask.sum()) == w.size - int(np.floor(w.size * 0.6 + 0.5))


@pytest.mark.parametrize(("solver", "share"), [("gptq", 0.7), ("sign_round", 0.85)])
def test_held_out_outputs_are_nearer_than_of_rounding(solver, share):
    w, moment, held_out = problem()
    scale = jnp.asarray(steps(w, 50, INT3.top))
    solve = gptq if solver == "gptq" else sign_round
    levels = solve(jnp.asarray(w), jnp.asarray(moment), Grid(scale), INT3)
    error = lambda values: np.linalg.norm(held_out @ (np.asarray(values) - w))
    nearest = Grid(scale).nearest(jnp.asarray(w), INT3)
    assert error(levels * scale) < share * error(nearest)


def test_sign_round_is_never_worse_than_rounding_in_any_column():
    w, moment, _ = problem()
    grid = Grid(jnp.asarray(steps(w, 50, INT3.top)))
    levels = sign_round(jnp.asarray(w), jnp.asarray(moment), grid, INT3, steps=5)
    h = np.asarray(conditioned(jnp.asarray(moment)), np.float64)
    cost = lambda values: np.einsum("kn,kj,jn->n", d := np.asarray(values) - w, h, d)
    nearest = grid.nearest(jnp.asarray(w), INT3)
    assert np.all(cost(grid.values(levels, INT3)) <= cost(nearest) * (1 + 1e-5))
    # Next to the entries: rounded up or down.
    assert np.max(np.abs(np.asarray(levels) - np.clip(w / np.asarray(grid.scale), -4, 3))) <= 1.0


SMALL = (12, 5)  # one shape, so that examples share a program
matrices = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed))


@settings(max_examples=15, deadline=None)
@given(matrices)
def test_values_on_the_grid_stay(rng):
    w = rng.integers(-4, 4, SMALL).astype(np.float32)
    x = rng.standard_normal((20, 12)).astype(np.float32)
    grid = Grid(jnp.ones(SMALL))
    got = gptq(jnp.asarray(w), jnp.asarray(x.T @ x), grid, INT3)
    np.testing.assert_array_equal(got, w)


@settings(max_examples=15, deadline=None)
@given(matrices)
def test_without_correlation_every_entry_is_rounded_to_the_nearest(rng):
    w = 3 * rng.standard_normal(SMALL).astype(np.float32)
    moment = np.diag(rng.random(12) * (rng.random(12) < 0.7)).astype(np.float32)
    grid = Grid(jnp.ones(SMALL))
    got = gptq(jnp.asarray(w), jnp.asarray(moment), grid, INT3)
    np.testing.assert_array_equal(got, grid.levels(jnp.asarray(w), INT3))


@settings(max_examples=15, deadline=None)
@given(matrices)
def test_stacks_are_solved_entry_by_entry(rng):
    w = rng.standard_normal((3, *SMALL)).astype(np.float32) * [[[1.0]], [[1e-3]], [[1e3]]]
    x = rng.standard_normal((3, 20, 12)).astype(np.float32)
    moment = np.einsum("eri,erj->eij", x, x).astype(np.float32)
    scale = np.abs(w).max(1, keepdims=True) / 3.5 + np.zeros_like(w)
    as_jax = lambda *xs: [jnp.asarray(x, jnp.float32) for x in xs]
    w, moment, scale = as_jax(w, moment, scale)
    got = gptq(w, moment, Grid(scale), INT3)
    for i in range(3):
        np.testing.assert_array_equal(got[i], gptq(w[i], moment[i], Grid(scale[i]), INT3))


@settings(max_examples=15, deadline=None)
@given(matrices, st.booleans())
def test_half_quadratic_never_ends_above_its_start(rng, symmetric):
    x = rng.standard_t(2, SMALL).astype(np.float32)
    scale = np.abs(x).max(0, keepdims=True) / 3.5
    zero = None if symmetric else jnp.zeros((1, 5), jnp.int8)
    new, shift = half_quadratic(jnp.asarray(x), jnp.asarray(scale), zero, (0,), INT3)

    def cost(scale, zero):
        scale, zero = np.asarray(scale), 0 if zero is None else np.asarray(zero, np.float32)
        view = (np.clip(np.round(x / scale) + zero, -4, 3) - zero) * scale
        return np.sum(np.abs(x - view) ** 0.7, 0)

    assert np.all(np.asarray(new) > 0)
    assert np.all(cost(new, shift) <= cost(scale, zero) * (1 + 1e-4))
    if shift is not None:
        assert shift.dtype == jnp.int8


def test_solvers_are_one_program():
    w, moment, _ = problem()
    grid = Grid(jnp.asarray(steps(w, 50, INT4.top)))
    jitted = jax.jit(lambda w: gptq(w, jnp.asarray(moment), grid, INT4))
    np.testing.assert_array_equal(
        jitted(jnp.asarray(w)), gptq(jnp.asarray(w), jnp.asarray(moment), grid, INT4)
    )


def test_relaxed_rounding_finds_small_errors():
    """Beside all 256 ways to round 8 entries up or down."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 3)) @ rng.normal(size=(3, 8)) + 0.1 * rng.normal(size=(64, 8))
    w, h = rng.normal(size=(8, 5)).astype(np.float32), (x.T @ x / 64).astype(np.float32)
    fmt = format_of("int4")
    grid = Grid(jnp.full(w.shape, 0.5))
    levels = np.asarray(ada_round(jnp.asarray(w), jnp.asarray(h), grid, fmt))
    error = lambda values: np.einsum("kn,kl,ln->n", values - w, h, values - w)
    low = np.floor(w / 0.5)
    ups = np.array(list(itertools.product([0, 1], repeat=8)))[:, :, None]
    every = np.stack([error((low + up) * 0.5) for up in ups])
    nearest, found = error(np.round(w / 0.5) * 0.5), error(levels * 0.5)
    assert ((levels == low) | (levels == low + 1)).all()
    assert (found <= nearest * (1 + 1e-5)).all()
    # The relaxation is no search of all: half of what rounding to the nearest loses beside it.
    assert (found - every.min(0)).sum() < 0.5 * (nearest - every.min(0)).sum()
