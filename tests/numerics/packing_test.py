"""Packed words against the layout's definition, entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_compress.numerics.packing import pack, pack_mask, unpack, unpack_mask


def pack_by_entry(codes, bits, axis, block):
    """The planar layout, written from its definition."""
    rows = np.moveaxis(codes, axis, 0)
    words = np.zeros((rows.shape[0] * bits // 8, *rows.shape[1:]), np.uint8)
    width = block * bits // 8
    for k, row in enumerate(rows):
        start, within = divmod(k, block)
        run, i = divmod(within, width)
        words[start * width + i] |= ((row & (2**bits - 1)) << (run * bits)).astype(np.uint8)
    return np.moveaxis(words, 0, axis)


@st.composite
def layouts(draw):
    bits = draw(st.sampled_from([1, 2, 4]))
    # Few sizes, since each shape compiles anew.
    block = 8 // bits * draw(st.sampled_from([1, 3]))
    blocks = draw(st.sampled_from([0, 1, 2]))
    shape = draw(st.sampled_from([(), (3,), (2, 3), (0,)]))
    at = draw(st.integers(0, len(shape)))
    axis = draw(st.sampled_from([at, at - len(shape) - 1]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    low = -(2 ** (bits - 1))
    return (
        rng.integers(low, -low, (*shape[:at], blocks * block, *shape[at:]), np.int8),
        bits,
        axis,
        block,
    )


@settings(max_examples=24, deadline=None)
@given(layouts())
def test_pack_and_unpack(layout):
    codes, bits, axis, block = layout
    words = jax.jit(pack, static_argnums=(1, 2, 3))(codes, bits, axis, block)
    assert words.dtype == jnp.uint8
    np.testing.assert_array_equal(words, pack_by_entry(codes, bits, axis, block))
    back = jax.jit(unpack, static_argnums=(1, 2, 3))(words, bits, axis, block)
    assert back.dtype == jnp.int8
    np.testing.assert_array_equal(back, codes)


def test_other_dtypes_of_codes():
    codes = np.arange(-8, 8)
    for dtype in ("int4", "int8", "int32"):
        words = pack(jnp.asarray(codes).astype(dtype), 4, 0, 8)
        np.testing.assert_array_equal(words, pack_by_entry(codes, 4, 0, 8))


def test_unpack_is_elementwise():
    """No gather, no concatenation, no product: only what fuses into a consumer."""
    for axis in (0, 1, 2):
        jaxpr = jax.make_jaxpr(lambda w, axis=axis: unpack(w, 2, axis, 8))(
            jnp.ones((4, 4, 4), "uint8")
        )
        names = {eqn.primitive.name for eqn in jaxpr.jaxpr.eqns}
        assert names <= {
            "reshape",
            "broadcast_in_dim",
            "shift_left",
            "shift_right_arithmetic",
            "bitcast_convert_type",
        }


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([(), (2,), (2, 3), (0,)]),
    st.sampled_from([0, 1, 7, 8, 9, 24]),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_masks(others, length, at, seed):
    at = min(at, len(others))
    mask = np.random.default_rng(seed).random((*others[:at], length, *others[at:])) < 0.5
    words = pack_mask(jnp.asarray(mask), at)
    assert words.shape[at] == -(-length // 8)
    want = np.moveaxis(np.zeros(words.shape, np.uint8), at, 0)
    for k, row in enumerate(np.moveaxis(mask, at, 0)):
        want[k // 8] |= row.astype(np.uint8) << (k % 8)
    np.testing.assert_array_equal(words, np.moveaxis(want, 0, at))
    back = unpack_mask(words, at, length)
    assert back.dtype == bool
    np.testing.assert_array_equal(back, mask)


@pytest.mark.parametrize("bits, block, length", [(3, 8, 8), (2, 6, 12), (2, 8, 12), (8, 8, 8)])
def test_errors(bits, block, length):
    with pytest.raises(ValueError, match="cannot pack"):
        pack(jnp.zeros(length, jnp.int8), bits, 0, block)
