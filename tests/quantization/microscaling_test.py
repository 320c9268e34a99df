"""The microscaling formats of torchao."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.numerics.steps import step_value
from tests.quantization.oracles import (
    MX,
    absmax,
    answers,
    assert_equal_values,
    levels_at,
    matrix,
    on_grid,
    ours,
    patterns,
    unsigned_zeros,
    values,
    wide,
)

pytestmark = pytest.mark.xdist_group("quantization_oracles")


@pytest.mark.parametrize(("dtype", "name"), MX.items())
def test_microscaling_of_torchao(dtype, name):
    """The standard's scales, bit for bit from one end to the other."""
    want, x = answers("microscaling")[f"{dtype}_floor"], matrix("microscaling")
    scale, _, view = ours(name, x)
    some = absmax(x, 2) > 0
    bits = np.log2(scale).astype(int) + 127
    np.testing.assert_array_equal(bits[some], want["scale_bits"][some])
    codes = patterns(name, on_grid(name, x, scale))
    np.testing.assert_array_equal(unsigned_zeros(name, codes), unsigned_zeros(name, want["codes"]))
    assert_equal_values(view, want["dequantized"])


@pytest.mark.parametrize("rule", ["ceil", "even", "rceil"])
@pytest.mark.parametrize(("dtype", "name"), MX.items())
def test_other_scales_of_microscaling(dtype, name, rule):
    """The scales of other rules are taken as they are given; then codes are the same."""
    want, x = answers("microscaling")[f"{dtype}_{rule}"], matrix("microscaling")
    bits = np.where(absmax(x, 2) > 0, want["scale_bits"], 127)
    scale = np.asarray(step_value(jnp.asarray(bits).view(jnp.float8_e8m0fnu)))
    codes = patterns(name, on_grid(name, x, scale))
    np.testing.assert_array_equal(unsigned_zeros(name, codes), unsigned_zeros(name, want["codes"]))


def test_nvfp4_of_torchao_on_its_scales():
    want, x = answers("microscaling")["nvfp4"], matrix("microscaling")
    scale = want["scale_bits"].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = patterns("nvfp4", on_grid("nvfp4", x, scale))
    same = unsigned_zeros("nvfp4", want["codes"])
    np.testing.assert_array_equal(unsigned_zeros("nvfp4", codes), same)
    levels = levels_at("nvfp4", want["codes"])
    assert_equal_values(values(levels, scale), want["dequantized"])


def test_nvfp4_of_torchao_on_two_levels():
    want, x = answers("microscaling")["nvfp4_two_level"], matrix("microscaling")
    tensor = matrix("microscaling", "tensor_scale")
    theirs = want["scale_bits"].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    c = jc.quantize("nvfp4")
    leaf = c.init({"w": jnp.asarray(x.T)}).leaves["w"]
    np.testing.assert_array_max_ulp(np.asarray(leaf.scale.scale).reshape(()), tensor, 2)
    codes = np.asarray(leaf.scale.codes).astype(np.float32).T
    # Scales are at least the least normal number there, the least one here.
    some = (absmax(x, 4) > 0) & (theirs > 2.0**-6)
    np.testing.assert_array_equal(codes[some], theirs[some])
    # Divisions by both scales are in another order: entries may cross the middle of two levels.
    at = on_grid("nvfp4", x, theirs * tensor)
    levels = levels_at("nvfp4", want["codes"])
    ratio = np.abs(x.astype(float)) / wide(theirs.astype(float) * tensor, x.shape)
    middle = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    clear = np.abs(ratio[..., None] / middle - 1).min(-1) > 1e-6
    assert_equal_values(at[clear], levels[clear])
    assert clear.mean() > 0.9
    np.testing.assert_allclose(values(levels, theirs * tensor), want["dequantized"], rtol=2.0**-22)
