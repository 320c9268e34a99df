"""Values under masks against loops over entries."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_compress.arrays.sparse import sparse_nm, sparse_rows
from jaxopt_compress.numerics.sparse import expand, expand_nm, gather_kept, gather_kept_nm

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16, np.int8, ml_dtypes.int4]
seeds = st.integers(0, 99)


def entries(rng, shape, dtype):
    x = (rng.normal(size=shape) * 3).round(2).astype(np.float32)
    x.reshape(-1)[::3] = -0.0
    return np.clip(x, -8, 7).astype(dtype)


def same_bits(got, want):
    got = np.asarray(got)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([(0,), (5,), (17,), (3, 9), (2, 0), (2, 2, 8)]),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.4, 1.0]),
    seeds,
)
def test_rows(shape, dtype, density, seed):
    rng = np.random.default_rng(seed)
    dense, mask = entries(rng, shape, dtype), rng.random(shape) < density
    capacity = int(mask.sum(-1).max(initial=0))
    want = np.zeros((*shape[:-1], capacity), dtype)
    for index in np.ndindex(shape[:-1]):
        kept = dense[index][mask[index]]
        want[index][: len(kept)] = kept
    values = gather_kept(jnp.asarray(dense), jnp.asarray(mask), capacity)
    same_bits(values, want)
    same_bits(expand(values, jnp.asarray(mask)), np.where(mask, dense, np.zeros((), dtype)))


@st.composite
def patterns(draw):
    n, m = draw(st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 8), (4, 4)]))
    length = draw(st.sampled_from([0, 3, 8, 12]))
    at = draw(st.integers(0, 2))
    shape = [2, 3]
    shape.insert(at, length)
    rng = np.random.default_rng(draw(seeds))
    mask = np.zeros(shape, bool)
    lines = np.moveaxis(mask, at, -1)
    for index in np.ndindex(2, 3):
        for start in range(0, length, m):
            order = start + rng.permutation(min(m, length - start))
            lines[index][order[: rng.integers(n, endpoint=True)]] = True
    return entries(rng, shape, draw(st.sampled_from(DTYPES))), mask, n, m, at - 3


@pytest.mark.ci
@settings(max_examples=8, deadline=None)
@given(patterns())
def test_n_of_m(case):
    dense, mask, n, m, axis = case
    want = np.where(mask, dense, np.zeros((), dense.dtype))
    store = jax.jit(sparse_nm, static_argnums=(2, 3, 4))
    leaf = store(jnp.asarray(dense), jnp.asarray(mask), n, m, axis)
    same_bits(leaf.materialize(), want)
    same_bits(leaf.mask(), mask)
    length = dense.shape[axis]
    assert leaf.values.shape[axis] == -(-length // m) * n
    assert (leaf.length is None) == (length % 8 == 0 and length % m == 0)
    if length % m == 0:
        groups = np.moveaxis(mask, axis, -1).reshape(-1, m)
        kept = np.zeros((len(groups), n), dense.dtype)
        for row, group, x in zip(
            kept, groups, np.moveaxis(dense, axis, -1).reshape(-1, m), strict=True
        ):
            row[: group.sum()] = x[group]
        lines = np.moveaxis(dense, axis, -1).shape[:-1]
        kept = np.moveaxis(kept.reshape(*lines, length // m * n), -1, axis)
        values = gather_kept_nm(jnp.asarray(dense), jnp.asarray(mask), n, m, axis)
        same_bits(values, kept)
        same_bits(expand_nm(values, jnp.asarray(mask), n, m, axis), want)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([(5,), (3, 4), (2, 3, 4), (0, 4)]),
    st.integers(1, 3),
    st.sampled_from(DTYPES),
    seeds,
)
def test_stored_rows(shape, core_ndim, dtype, seed):
    core_ndim = min(core_ndim, len(shape))
    rng = np.random.default_rng(seed)
    dense, mask = entries(rng, shape, dtype), rng.random(shape) < rng.random()
    leaf = sparse_rows(jnp.asarray(dense), jnp.asarray(mask), core_ndim)
    same_bits(leaf.materialize(), np.where(mask, dense, np.zeros((), dtype)))
    same_bits(leaf.mask(), mask)
    assert leaf.shape == shape and leaf.values.ndim == leaf.words.ndim == len(shape)
    other = entries(rng, shape, dtype)
    same_bits(
        leaf.with_entries(jnp.asarray(other)).materialize(),
        np.where(mask, other, np.zeros((), dtype)),
    )


@pytest.mark.parametrize("core_ndim", [0, 3])
def test_rows_of_other_ranks(core_ndim):
    with pytest.raises(ValueError, match=r"core_ndim=\d of an array of shape \(2, 2\)"):
        sparse_rows(jnp.ones((2, 2)), jnp.ones((2, 2), bool), core_ndim)
