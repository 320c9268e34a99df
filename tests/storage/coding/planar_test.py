import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_compress.arrays.fields import Packing
from jaxopt_compress.numerics import packing
from jaxopt_compress.storage.coding import planar


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("axis", [-1, -2])
def test_codes_are_those_of_the_words_that_jax_packs(bits, axis):
    runs = packing.layout(bits).runs
    shape = [3, 8, 8]
    shape[axis] = 4 * runs
    codes = np.random.default_rng(0).integers(0, 2**bits, shape).astype(np.uint8)
    words = np.asarray(packing.pack(jnp.asarray(codes), bits, axis, 2 * runs))
    how = Packing(bits, axis, 2 * runs)
    assert planar.fits(words.shape, how)
    np.testing.assert_array_equal(planar.unpack(words, how), codes)
    np.testing.assert_array_equal(planar.pack(codes, how), words)


def test_words_of_other_shapes_do_not_fit():
    assert not planar.fits((3, 5), Packing(3, -1, 8))
    assert not planar.fits((8,), Packing(2, -2, 4))
    assert not planar.fits((8,), Packing(8, -1, 1))
