"""Batches without rows, and batches of zeros, in products, convolutions and ragged products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxopt_compress as jc
from tests.models.case import normal

NUMBERS = ("NHWC", "HWIO", "NHWC")
FORMS = {
    "dense": (lambda p, x: x @ p["w"], (8, 4), (5, 8)),
    "conv": (
        lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=NUMBERS),
        (3, 3, 4, 6),
        (2, 5, 5, 4),
    ),
    "ragged": (
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.zeros(3, jnp.int32).at[1].set(len(x))),
        (3, 8, 4),
        (5, 8),
    ),
}
METHODS = {
    "int8": jc.quantize("int8"),
    "int4 g4": jc.quantize("int4", group_size=4),
    "w8a8": jc.quantize("int8", activations="int8"),
    "sparse": jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)),
    "low rank": jc.low_rank(rank=2),
}


@pytest.mark.fast("int8-dense", "w8a8-dense", "int4 g4-conv", "w8a8-ragged", "low rank-conv")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_no_rows(form, method):
    fn, w, x = FORMS[form]
    params, empty = {"w": normal(0, *w)}, normal(1, *x)[:0]
    small = jc.compress(params, METHODS[method], uses=jc.uses(fn, params, normal(1, *x)))
    run = jax.jit(jc.lift(fn, on_fallback="error"))
    assert run(small, empty).shape == fn(params, empty).shape
    grad = jax.grad(lambda x: jc.lift(fn)(small, x).sum())(empty)
    assert grad.shape == empty.shape


@pytest.mark.parametrize("form", FORMS)
def test_empty_batches_change_no_statistics(form):
    fn, w, x = FORMS[form]
    params, full = {"w": normal(0, *w)}, normal(1, *x)
    want = jc.calibrate(fn, params, [full])
    for batches in ([full[:0], full], [full, full[:0]]):
        jax.tree.map(np.testing.assert_array_equal, jc.calibrate(fn, params, batches), want)
    (zeros,) = jc.calibrate(fn, params, [0 * full, full])["w"]
    assert bool(jnp.all(jnp.isfinite(zeros.second_moment)))
    with pytest.raises(ValueError, match="at least one batch that is not empty"):
        jc.calibrate(fn, params, [full[:0]])
