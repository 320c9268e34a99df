"""Packed words against the layout's definition, entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_compress.numerics.packing import layout, pack, pack_mask, unpack, unpack_mask

WIDTHS = range(1, 8)
each_width = pytest.mark.parametrize("bits", WIDTHS)


def rows_of(bits):
    """Rows of words per block: the fewest whose left-over bits are whole codes."""
    left = 8 % bits
    return next(r for r in range(1, 8) if r * left % bits == 0)


def pack_by_entry(codes, bits, axis, block):
    """The planar layout, bit by bit, from its definition."""
    lines = np.moveaxis(codes, axis, 0)
    words = np.zeros((lines.shape[0] * bits // 8, *lines.shape[1:]), np.uint8)
    rows, whole, left = rows_of(bits), 8 // bits, 8 % bits
    runs = rows * 8 // bits
    width = block // runs
    for k, line in enumerate(lines):
        start, within = divmod(k, block)
        run, i = divmod(within, width)
        for bit in range(bits):
            if run < rows * whole:
                row, place = run % rows, run // rows * bits + bit
            else:
                # The highest bits of all rows, one after the other, are one row of bits.
                row, at = divmod((run - rows * whole) * bits + bit, left)
                place = whole * bits + at
            word = start * rows * width + row * width + i
            words[word] |= ((line.astype(int) >> bit & 1) << place).astype(np.uint8)
    return np.moveaxis(words, 0, axis)


def codes_of(rng, bits, signed, shape):
    low = -(2 ** (bits - 1)) if signed else 0
    return rng.integers(low, low + 2**bits, shape, np.int8 if signed else np.uint8)


@each_width
def test_layout(bits):
    how = layout(bits)
    assert (how.rows, how.whole, how.spare) == (rows_of(bits), 8 // bits, 8 % bits)
    # Every bit of the words of a block is used.
    assert how.runs * bits == 8 * how.rows


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@each_width
def test_pack_and_unpack(bits, signed):
    rng, block = np.random.default_rng(bits), 2 * layout(bits).runs
    # Widths take turns, so that each axis is met by words of one row and of several.
    axis = (bits + signed) % 3
    for at, blocks in [(axis, 3), (axis - 3, 0)]:
        shape = [2, 3, 4]
        shape[at] = blocks * block
        codes = codes_of(rng, bits, signed, shape)
        words = jax.jit(pack, static_argnums=(1, 2, 3))(codes, bits, at, block)
        assert words.dtype == jnp.uint8
        np.testing.assert_array_equal(words, pack_by_entry(codes, bits, at, block))
        back = jax.jit(unpack, static_argnums=(1, 2, 3, 4))(words, bits, at, block, signed)
        assert back.dtype == codes.dtype
        np.testing.assert_array_equal(back, codes)


def test_other_dtypes_of_codes():
    codes = np.arange(-8, 8)
    for dtype in ("int4", "int8", "int16", "int32"):
        words = pack(jnp.asarray(codes).astype(dtype), 4, 0, 8)
        np.testing.assert_array_equal(words, pack_by_entry(codes, 4, 0, 8))
    positions = np.arange(16)
    for dtype in ("uint4", "uint8", "int32"):
        words = pack(jnp.asarray(positions).astype(dtype), 4, 0, 8)
        np.testing.assert_array_equal(words, pack_by_entry(positions, 4, 0, 8))


@each_width
def test_unpack_is_elementwise(bits):
    """No gather, no product: only what fuses into a consumer, and for odd widths one join."""
    fusing = {
        *("reshape", "broadcast_in_dim", "shift_left", "shift_right_arithmetic"),
        *("shift_right_logical", "bitcast_convert_type", "convert_element_type", "or", "squeeze"),
        "slice",
    }
    joining = {"concatenate", "stack"} if 8 % bits else set()
    for axis in (0, 2):
        shape = [4, 4, 4]
        shape[axis] = rows_of(bits)
        words = jax.ShapeDtypeStruct(shape, "uint8")
        run = lambda words, axis=axis: unpack(words, bits, axis, layout(bits).runs)
        names = {eqn.primitive.name for eqn in jax.make_jaxpr(run)(words).jaxpr.eqns}
        assert names <= fusing | joining, names - fusing - joining


@settings(max_examples=6, deadline=None)
@given(
    st.sampled_from([(), (2, 3), (0,)]),
    st.sampled_from([0, 7, 24]),
    st.integers(0, 1),
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


@pytest.mark.parametrize(
    ("bits", "block", "length", "message"),
    [
        (3, 12, 24, "24 entries of 3 bits in blocks of 12: .* a multiple of 8 and divide 24"),
        (2, 6, 12, "12 entries of 2 bits in blocks of 6: .* a multiple of 4 and divide 12"),
        (2, 8, 12, "12 entries of 2 bits in blocks of 8: .* a multiple of 4 and divide 12"),
        (8, 8, 8, "cannot pack 8-bit codes; packed widths are 1 to 7 bits"),
        (0, 8, 8, "cannot pack 0-bit codes; packed widths are 1 to 7 bits"),
    ],
)
def test_errors(bits, block, length, message):
    with pytest.raises(ValueError, match=message):
        pack(jnp.zeros(length, jnp.int8), bits, 0, block)
