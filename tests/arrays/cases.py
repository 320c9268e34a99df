"""Every compressed array as a case of a test, and how its values are compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.array_contract import LEAVES, assert_same_bits

# Those that differ from others in sizes or combine them run when asked for.
ALIKE = (
    *("int8_tensor", "int8_scalar", "int8_last", "int8_one_group", "int2_unpacked", "int1"),
    *("1:4", "low_rank_out", "int4_2:4", "nf4_rows", "int4_and_low_rank_and_2:4"),
)
each_leaf = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=pytest.mark.slow if case.name in ALIKE else [])
        for case in LEAVES
    ],
)


@functools.cache
def made(case, stack=(), seed=0):
    """An example and its dense array, computed once for all tests."""
    leaf, formula = case.example(stack, seed)
    dense = jax.jit(materialize)(leaf) if stack else leaf.materialize()
    return leaf, jax.jit(formula), np.asarray(dense)


def materialize(leaf):
    return leaf.materialize()


def assert_parts(case, got, want):
    """Equal bits where the form promises them, else equal up to the order of a sum over ranks."""
    if case.exact:
        return assert_same_bits(got, want)
    got, want = np.asarray(got), np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    # Two sums of three products, in units of the last place of the largest.
    bound = 3 * float(jnp.finfo(want.dtype).eps) * np.abs(want.astype("float32")).max()
    np.testing.assert_allclose(got.astype("float32"), want.astype("float32"), rtol=0, atol=bound)
