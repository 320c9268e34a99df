"""Groups against loops over slices."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_compress.numerics.groups import range_of, split_groups, spread

SHAPES = [(8,), (4, 6), (2, 4, 6), (0, 4), (4, 0)]


@st.composite
def grouped(draw):
    shape = draw(st.sampled_from(SHAPES))
    axis = draw(st.integers(-len(shape), -1))
    group = draw(st.sampled_from([None, *(g for g in (1, 2, 3, 4) if shape[axis] % g == 0)]))
    others = [a for a in range(-len(shape), 0) if group is None or a != axis]
    reduce = tuple(a for a in others if draw(st.booleans()))
    dtype = draw(st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16]))
    x = np.random.default_rng(draw(st.integers(0, 99))).normal(size=shape).astype(dtype)
    x.reshape(-1)[::3] = -0.0
    return x, reduce, axis, group


@settings(max_examples=25, deadline=None)
@given(grouped())
def test_range_of(case):
    x, reduce, axis, group = case
    low, high = range_of(jnp.asarray(x), reduce, axis, group)
    size = [1 if i - x.ndim in reduce else n for i, n in enumerate(x.shape)]
    step = [n if i - x.ndim in reduce else 1 for i, n in enumerate(x.shape)]
    if group is not None:
        size[axis], step[axis] = x.shape[axis] // group, group
    assert low.shape == high.shape == tuple(size)
    assert low.dtype == high.dtype == jnp.float32
    for index in np.ndindex(*size):
        part = x[tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, step, strict=True))]
        part = part.astype(np.float32)
        assert low[index] == (part.min() if part.size else 0)
        assert high[index] == (part.max() if part.size else 0)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(-3, -1), st.sampled_from([1, 2, 3]))
def test_spread_and_split(shape, axis, group):
    axis = max(axis, -len(shape))
    x = np.arange(np.prod(shape)).reshape(shape)
    wide = spread(jnp.asarray(x), axis, group)
    np.testing.assert_array_equal(wide, np.repeat(x, group, axis))
    parts = split_groups(wide, axis, group)
    np.testing.assert_array_equal(
        parts, np.repeat(np.expand_dims(x, x.ndim + axis + 1), group, axis)
    )
