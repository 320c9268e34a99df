"""Groups against loops over slices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_compress.numerics.groups import by_groups, spread, spread_to

SHAPES = [(8,), (2, 4, 6), (0, 7)]


def extremes(x, axes):
    return jnp.min(x, axes, keepdims=True), jnp.sum(x, axes, keepdims=True)


@pytest.mark.parametrize(
    ("shape", "reduce", "cuts"),
    [
        ((8,), (), []),
        ((8,), (-1,), []),
        ((8,), (), [(-1, 3)]),
        ((4, 6), (-2,), [(-1, 4)]),
        ((4, 6), (), [(-2, 2), (-1, 3)]),
        ((5, 7), (), [(-1, 3), (-2, 16)]),
        ((5, 7), (-1,), [(-2, 1)]),
        ((2, 4, 6), (-3,), [(-1, 4), (-2, 3)]),
        ((2, 4, 6), (-1, -2), [(-3, 2)]),
    ],
)
def test_by_groups(shape, reduce, cuts):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    low, total = map(np.asarray, jax.jit(lambda x: by_groups(extremes, x, reduce, cuts))(x))
    step = [n if d - x.ndim in reduce else 1 for d, n in enumerate(shape)]
    for axis, group in cuts:
        step[axis] = group
    size = [-(-n // s) for n, s in zip(shape, step, strict=True)]
    assert low.shape == total.shape == tuple(size)
    for index in np.ndindex(*size):
        part = x[tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, step, strict=True))]
        # A group that is cut short is filled up with zeros.
        short = part.size < np.prod(step)
        assert low[index] == min(part.min(), 0 if short else np.inf)
        np.testing.assert_allclose(total[index], part.sum(dtype=float), rtol=0, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.lists(st.integers(-3, -1), min_size=1, max_size=2, unique=True),
    st.sampled_from([2, 3]),
    st.booleans(),
)
def test_spread_to(shape, axes, group, single):
    cuts = [(max(a, -len(shape)), group) for a in axes][: len(shape)]
    cuts = list(dict(cuts).items())
    groups = [-(-n // dict(cuts).get(d - len(shape), n or 1)) for d, n in enumerate(shape)]
    if single:
        groups[cuts[0][0]] = 1
    x = np.arange(np.prod(groups)).reshape(groups)
    want = x
    for axis, g in cuts:
        if want.shape[axis] > 1:
            want = np.take(np.repeat(want, g, axis), range(shape[axis]), axis)
    got = spread_to(jnp.asarray(x), cuts, shape)
    np.testing.assert_array_equal(got, want)
    # What was spread meets the entries.
    assert np.broadcast_shapes(got.shape, shape) == shape


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(-3, -1), st.sampled_from([1, 2, 3]))
def test_spread(shape, axis, group):
    axis = max(axis, -len(shape))
    x = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(spread(jnp.asarray(x), axis, group), np.repeat(x, group, axis))


def test_spread_is_a_broadcast():
    jaxpr = jax.make_jaxpr(lambda x: spread(x, -2, 4))(jnp.ones((2, 3, 4)))
    names = {eqn.primitive.name for eqn in jaxpr.jaxpr.eqns}
    assert names <= {"reshape", "broadcast_in_dim"}
