import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from jaxopt_compress.storage.words import from_words, to_words


@given(data=st.data(), bits=st.integers(1, 8), axis=st.sampled_from([None, -1, -2]))
def test_words_hold_codes_in_the_fewest_bytes(data, bits, axis):
    shape = data.draw(st.tuples(*[st.integers(0, 3)] * 2))
    shape = tuple(8 * n if d - 2 == axis else n for d, n in enumerate(shape))
    count = int(np.prod(shape))
    codes = data.draw(st.lists(st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)))
    codes = np.resize(np.array([*codes, 0], np.int8), count).reshape(shape)
    words = to_words(codes, bits, axis)
    assert words.size == -(-count * bits // 8)
    np.testing.assert_array_equal(from_words(words, bits, axis, shape, np.int8), codes)


def test_words_are_a_little_endian_stream_of_codes():
    codes = np.arange(8, dtype=np.int8)
    assert to_words(codes, 4, None).tolist() == [0x10, 0x32, 0x54, 0x76]
    assert to_words(codes[:4], 2, None).tolist() == [0b11100100]
    three = sum(int(c) << 3 * i for i, c in enumerate(codes))
    assert to_words(codes, 3, -1).tobytes() == three.to_bytes(3, "little")
