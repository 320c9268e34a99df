import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_compress.numerics.keep_count import keep_count
from jaxopt_compress.sparsity.schedule import as_schedule
from jaxopt_compress.sparsity.schedules import (
    constant,
    cyclic,
    exponential,
    from_optax,
    one_shot,
    polynomial,
)

LAWS = settings(deadline=None, derandomize=True, max_examples=200)


def test_polynomial_known_answers():
    schedule = polynomial(0.8, begin=100, end=110, initial=0.2)
    sparsity = jax.jit(schedule.sparsity)
    for step, want in [(0, 0.2), (100, 0.2), (102, 0.4928), (105, 0.725), (110, 0.8), (999, 0.8)]:
        np.testing.assert_allclose(sparsity(step), want, rtol=2e-7)
    assert sparsity(100) == np.float32(0.2) and sparsity(110) == np.float32(0.8)
    assert sparsity(5).dtype == jnp.float32


@LAWS
@given(
    st.floats(0, 0.999),
    st.floats(0, 0.999),
    st.integers(0, 10**9),
    st.integers(1, 10**9),
    st.sampled_from([0.5, 1, 2, 3]),
    st.floats(-0.5, 1.5),
)
def test_polynomial_is_the_formula(initial, final, begin, length, power, at):
    end = begin + length
    step = max(0, int(begin + at * length))
    p = min(max((step - begin) / length, 0.0), 1.0)
    want = final + (initial - final) * (1 - p) ** power
    got = polynomial(final, begin, end, initial, power).sparsity(np.int32(min(step, 2**31 - 1)))
    # A few roundings of numbers below 1; a root doubles nothing and a cube triples.
    assert abs(float(got) - want) <= 8 * 2.0**-24


@pytest.mark.parametrize("every", [1, 3, 4, 10, 50])
def test_due_on_the_grid_and_at_the_end(every):
    due = jax.jit(polynomial(0.9, begin=7, end=27, every=every).due)
    steps = [step for step in range(60) if due(step)]
    assert steps == sorted({*range(7, 28, every), 27})


def test_steps_may_be_arrays():
    schedule = polynomial(0.9, begin=0, end=10)
    steps = jnp.arange(12)
    np.testing.assert_array_equal(schedule.sparsity(steps), jax.vmap(schedule.sparsity)(steps))
    np.testing.assert_array_equal(schedule.due(steps), np.arange(12) <= 10)
    assert constant(0.3).sparsity(steps).shape == (12,)


def test_constant():
    schedule = constant(0.75)
    sparsity, due = jax.jit(schedule.sparsity), jax.jit(schedule.due)
    assert [float(sparsity(step)) for step in (0, 1, 10**6)] == [0.75] * 3
    assert [step for step in range(5) if due(step)] == [0]


def test_constant_with_updates():
    due = jax.jit(constant(0.75, every=10, end=35).due)
    assert [step for step in range(99) if due(step)] == [0, 10, 20, 30]


def test_one_shot():
    schedule = one_shot(0.75, 4)
    assert [float(schedule.sparsity(step)) for step in (0, 3, 4, 99)] == [0, 0, 0.75, 0.75]
    assert [step for step in range(9) if schedule.due(step)] == [4]


@LAWS
@given(st.floats(0, 0.99), st.floats(0, 0.99), st.integers(1, 10**6), st.floats(-0.5, 1.5))
def test_exponential_keeps_the_same_share_each_time(initial, final, length, at):
    """Against the formula; ends are exact."""
    schedule = exponential(final, begin=5, end=5 + length, initial=initial)
    step = int(5 + at * length)
    p = min(max((step - 5) / length, 0.0), 1.0)
    want = 1 - (1 - initial) ** (1 - p) * (1 - final) ** p
    assert abs(float(schedule.sparsity(step)) - want) <= 16 * 2.0**-24
    assert schedule.sparsity(5 + length) == np.float32(final)


def test_exponential_is_twenty_percent_of_what_is_left():
    schedule = exponential(1 - 0.8**10, begin=0, end=10)
    kept = [1 - float(schedule.sparsity(step)) for step in range(11)]
    np.testing.assert_allclose(np.divide(kept[1:], kept[:-1]), 0.8, rtol=2e-6)


@pytest.mark.parametrize(("dense", "sparse", "begin", "end"), [(2, 3, 1, 9), (1, 1, 0, 4)])
def test_cyclic_phases(dense, sparse, begin, end):
    """Due where a phase begins, and nowhere else but at step 0."""
    schedule = cyclic(0.5, dense, sparse, begin, end)
    phases = [float(schedule.sparsity(step)) > 0 for step in range(30)]
    for step in range(30):
        inside = step >= begin and (step - begin) % (dense + sparse) < sparse
        assert phases[step] == (inside or step >= end)
        changed = step == 0 or phases[step] != phases[step - 1]
        assert bool(schedule.due(step)) == changed


def test_functions_of_the_step():
    schedule = as_schedule(lambda step: 0.1 * step)
    assert float(schedule.sparsity(3)) == np.float32(0.1) * 3
    assert all(schedule.due(step) for step in range(5))
    assert [step for step in range(9) if from_optax(lambda step: 0.5, every=4).due(step)] == [
        0,
        4,
        8,
    ]
    for wrong in (0.5, None, constant, cyclic):
        with pytest.raises(TypeError, match="is no schedule"):
            as_schedule(wrong)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: constant(0.5, end=9), "end=9 of a mask that is computed once"),
        (lambda: constant(0.5, every=0), "every=0"),
        (lambda: one_shot(0.5, -1), "step=-1"),
        (lambda: exponential(0.5, 5, 5), "end=5 is not after begin=5"),
        (lambda: cyclic(0.5, 0, 2), "dense=0 and sparse=2"),
        (lambda: constant(1.0), r"sparsity=1\.0.*below 1"),
        (lambda: constant(-0.1), r"sparsity=-0\.1"),
        (lambda: constant(90), "sparsity=90"),
        (lambda: constant(math.nan), "sparsity=nan"),
        (lambda: polynomial(1.5, 0, 1), r"final=1\.5"),
        (lambda: polynomial(0.5, 0, 1, initial=-1), "initial=-1"),
        (lambda: polynomial(0.5, -1, 1), "begin=-1"),
        (lambda: polynomial(0.5, 5, 5), "end=5 is not after begin=5; at least 6"),
        (lambda: polynomial(0.5, 0, 1, power=0), "power=0"),
        (lambda: polynomial(0.5, 0, 1, every=0), "every=0"),
        (lambda: keep_count(2**31, 0.5), "size=2147483648"),
        (lambda: keep_count(-1, 0.5), "size=-1"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def exact_keep_count(size, sparsity):
    return size - math.floor(size * Fraction(float(np.float32(sparsity))) + Fraction(1, 2))


@LAWS
@given(
    st.one_of(
        st.integers(0, 100), st.integers(0, 2**31 - 1), st.sampled_from([2**24 + 1, 2**31 - 1])
    ),
    st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1 - 2.0**-24, 1.0])),
)
def test_keep_count_is_exact(size, sparsity):
    got = keep_count(size, sparsity)
    assert got.dtype == jnp.int32
    assert int(got) == exact_keep_count(size, sparsity)


def test_keep_count_over_many_sparsities_and_under_jit():
    rng = np.random.default_rng(0)
    small = 10.0 ** -rng.uniform(0, 40, 2000)
    sparsity = np.concatenate([rng.random(2000), small]).astype(np.float32)
    for size in (10, 16_777_217, 1_500_000_001, 2**31 - 1):
        want = [exact_keep_count(size, s) for s in sparsity]
        got = jax.jit(keep_count, static_argnums=0)(size, sparsity)
        np.testing.assert_array_equal(got, want)
    assert [int(keep_count(7, s)) for s in (-1.0, 2.0)] == [7, 0]
