"""What a backward pass keeps of a quantized product: rounded, unrounded or recomputed."""

import functools

import jax
import numpy as np
import pytest

import jaxopt_compress as jc
from tests.quantization.learned import steady
from tests.quantization.products import PRODUCTS, derivatives, distance, matmul, view_of

UNLIKE = ("matmul", "stack", "image", "zero points")
KINDS = [pytest.param(name, marks=[] if name in UNLIKE else pytest.mark.slow) for name in PRODUCTS]


@pytest.mark.parametrize("inputs", ["int8", None])
@pytest.mark.parametrize("name", KINDS)
def test_unrounded_residuals(name, inputs):
    """The result is the same; its derivatives are those of the floating function."""
    fn, w_shape, x_shape, options = PRODUCTS[name]
    params, x = {"w": steady(0, *w_shape) / w_shape[-2] ** 0.5}, steady(1, *x_shape)
    uses, out = jc.uses(fn, params, x), jax.eval_shape(fn, params, x)
    g = steady(2, *out.shape)
    rounded, unrounded = (
        view_of(
            jc.quantize(
                **{"format": "int8", **options},
                activations=inputs,
                backward=jc.backward(residuals=residuals),
            ),
            params,
            uses=uses,
        )
        for residuals in ("rounded", "unrounded")
    )
    # Sums of up to 256 products may be ordered otherwise; those of integers are exact.
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    run = jax.jit(jc.lift(fn, on_fallback="error"))
    results = run(unrounded, x), run(rounded, x)
    np.testing.assert_allclose(*results, **(tolerance if inputs is None else {"rtol": 0}))
    if name == "stack":
        return  # Each layer's input follows from rounded layers before it.
    to_w, to_x = jax.vjp(fn, params, x)[1](g)
    held, got_x = jax.jit(derivatives, static_argnums=0)(fn, unrounded, x, g)
    np.testing.assert_allclose(got_x, to_x, **tolerance)
    np.testing.assert_allclose(held["w"].weight.form.codes, to_w["w"], **tolerance)
    assert distance(derivatives(fn, rounded, x, g)[1], to_x) > 1e-4


@pytest.mark.parametrize("name", KINDS)
def test_recomputed_residuals(name):
    """Result and derivatives are those of weights that are seen rounded."""
    fn, w_shape, x_shape, options = PRODUCTS[name]
    params, x = {"w": steady(0, *w_shape) / w_shape[-2] ** 0.5}, steady(1, *x_shape)
    uses, g = jc.uses(fn, params, x), steady(2, *jax.eval_shape(fn, params, x).shape)
    run = jax.jit(lambda view: (jc.lift(fn)(view, x), derivatives(fn, view, x, g)))
    kinds = ("rounded", "recomputed")
    both = (
        jc.quantize(**{"format": "int8", **options}, backward=jc.backward(residuals=kind))
        for kind in kinds
    )
    (y, (dense, to_x)), (own_y, (held, own_to_x)) = (
        run(view_of(c, params, uses=uses)) for c in both
    )
    # Sums of up to 256 products may be ordered otherwise.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(own_y, y)
    close(own_to_x, to_x)
    close(held["w"].weight.form.codes, dense["w"])


@pytest.mark.parametrize(
    "options", [{"activations": "int8"}, {"backward": jc.backward(residuals="recomputed")}]
)
def test_rounded_copies_do_not_wait_for_the_way_back(options):
    params, x = {"w": steady(0, 32, 16)}, steady(1, 24, 32)

    def kept(c):
        """What a backward pass holds of the weight's shape, but the weight itself."""
        run = lambda view: jax.vjp(lambda v, x: jc.lift(matmul)(v, x), view, x)[1]
        pull = jax.jit(run)(view_of(c, params))
        alike = [np.asarray(a) for a in jax.tree.leaves(pull) if a.shape == params["w"].shape]
        return [a for a in alike if (a != params["w"]).any()]

    assert not kept(jc.quantize("int8", **options))
    assert len(kept(jc.quantize("int8"))) == 1
