"""Integers of torchao, and its straight-through gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.numerics.formats import FORMATS
from jaxopt_compress.quantization.straight_through import fake_quantize
from tests.quantization.oracles import (
    absmax,
    answers,
    assert_equal_values,
    matrix,
    on_grid,
    ours,
    values,
    wide,
)

pytestmark = pytest.mark.xdist_group("quantization_oracles")


TORCHAO = [f"int{bits}_group32" for bits in (2, 3, 4, 8)] + ["int4_channel", "int8_channel"]


@pytest.mark.parametrize("case", TORCHAO)
def test_integers_of_torchao(case):
    """The same formula, bit for bit from one end to the other."""
    name, group = case.split("_")
    want, x = answers("torchao")[case], matrix("torchao")
    scale, _, view = ours(name, x, group_size=32 if group == "group32" else None)
    some = absmax(x, scale.shape[1]) > 0
    np.testing.assert_array_equal(scale[some], want["scale"][some])
    assert not want["zero"].any()
    assert_equal_values(on_grid(name, x, scale), want["codes"])
    assert_equal_values(view, want["dequantized"])


TORCHAO_ASYMMETRIC = ["int4_asymmetric_token", "int8_asymmetric_token"]
TORCHAO_ASYMMETRIC += ["uint4_asymmetric_group32", "uint8_asymmetric_group32"]


@pytest.mark.parametrize("case", TORCHAO_ASYMMETRIC)
def test_asymmetric_integers_of_torchao(case):
    name = case.split("_")[0]
    want, x = answers("torchao")[case], matrix("torchao")
    scale, zero, view = ours(name, x, group_size=32 if "group" in case else None, symmetric=False)
    some = absmax(x, scale.shape[1]) > 0
    np.testing.assert_array_equal(scale[some], want["scale"][some])
    np.testing.assert_array_equal(zero[some], want["zero"][some])
    assert_equal_values(on_grid(name, x, scale, zero), want["codes"])
    assert_equal_values(view, want["dequantized"])


@pytest.mark.parametrize("case", ["int4_noclip_group32", "int8_narrow_channel", "int8_tensor"])
def test_other_steps_of_torchao(case):
    """On steps that clip nothing, on those of -127 to 127, and on one for all rows."""
    name = case.split("_")[0]
    want, x = answers("torchao")[case], matrix("torchao")
    # The step of nothing is the least normal float32 there, and has no finite reciprocal here.
    scale = np.where(want["scale"] > 1e-37, want["scale"], 1)
    assert_equal_values(on_grid(name, x, scale), want["codes"])
    assert_equal_values(values(want["codes"], scale), want["dequantized"])


STRAIGHT = {
    "ste_int4_group32": ("int4", {"group_size": 32}),
    "ste_int8_asymmetric_token": ("int8", {"symmetric": False}),
}


def assert_gradients(view, pull, want):
    cotangent = matrix("gradients", "cotangent")
    assert_equal_values(view, want["y"])
    slope = np.asarray(pull(jnp.asarray(cotangent))[0])
    assert ((slope == 0) | (slope == cotangent)).all()
    np.testing.assert_array_equal(slope == 0, want["grad_x"] == 0)
    # They multiply by the step and by its reciprocal, of the least normal float32 for zeros.
    np.testing.assert_allclose(slope, want["grad_x"], rtol=2e-5)


@pytest.mark.parametrize("case", STRAIGHT)
def test_gradients_of_torchao(case):
    name, given = STRAIGHT[case]
    x = jnp.asarray(matrix("gradients"))
    # They take what lies half a step above the top code for clipped, as a frozen grid does.
    c = jc.quantize(name, **given, freeze=0)
    state = c.init({"w": x.T})
    view, pull = jax.vjp(lambda w: c.apply({"w": w.T}, state)["w"].T, x)
    assert_gradients(view, pull, answers("gradients")[case])


def test_asymmetric_group_gradients_of_torchao():
    """With the zero points that they use: of groups, float offsets cut to integers, here 0 and -1.

    Those of our own are the ones of `choose_qparams_affine`, which are compared above.
    """
    x = matrix("gradients")
    parts = x.reshape(len(x), 2, -1)
    low, high = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
    scale = (high - low) / np.float32(15)
    zero = np.trunc(low + 8 * scale).astype(np.int8)
    assert set(zero.ravel()) == {0, -1}
    own, _, _ = ours("int4", x, group_size=32, symmetric=False)
    some = scale > 0
    np.testing.assert_array_equal(own[some], scale[some])
    scale, zero = (jnp.asarray(wide(v, x.shape)) for v in (np.where(some, scale, 1), zero))
    assert scale.dtype == jnp.float32
    fake = lambda x: fake_quantize(x, scale, zero, None, FORMATS["int4"])
    view, pull = jax.vjp(fake, jnp.asarray(x))
    assert_gradients(view, pull, answers("gradients")["ste_int4_asymmetric_group32"])
