"""Products of a trained weight: those of `lax.dot_general`, with derivatives of their own form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxopt_compress.kernels import trained_dot

# The shapes of x and w, and what is summed and kept in step.
PRODUCTS = {
    "matmul": ((6, 8), (8, 5), (((1,), (0,)), ((), ()))),
    "leading axes": ((2, 3, 8), (8, 5), (((2,), (0,)), ((), ()))),
    "weight's last axis": ((2, 3, 8), (5, 8), (((2,), (1,)), ((), ()))),
    "two summed, in turn": ((4, 6, 8), (8, 5, 4, 2), (((0, 2), (2, 0)), ((), ()))),
    "one row": ((8,), (8, 5), (((0,), (0,)), ((), ()))),
    "one column": ((6, 8), (8,), (((1,), (0,)), ((), ()))),
    "batch": ((3, 6, 8), (3, 8, 5), (((2,), (1,)), ((0,), (0,)))),
    "no rows": ((0, 8), (8, 5), (((1,), (0,)), ((), ()))),
}
each_product = pytest.mark.parametrize("name", PRODUCTS)


def whole(seed, *shape):
    """Small integers, whose sums of products are exact in any order."""
    return jnp.asarray(np.random.default_rng(seed).integers(-8, 9, shape), jnp.float32)


def operands(name):
    """x, w, and the product in both forms."""
    x_shape, w_shape, dims = PRODUCTS[name]
    own = functools.partial(trained_dot, dims=dims)
    plain = functools.partial(lax.dot_general, dimension_numbers=dims)
    return whole(0, *x_shape), whole(1, *w_shape), own, plain


@each_product
def test_value_and_derivatives(name):
    x, w, *products = operands(name)
    changes = whole(2, *x.shape), whole(3, *w.shape)
    g = whole(4, *jax.eval_shape(products[0], x, w).shape)

    def every(product):
        y, pushed = jax.jvp(product, (x, w), changes)
        pulled = jax.vjp(product, x, w)[1](g)
        # Twice: what the gradient of one factor moves by with the other.
        twice = jax.grad(lambda x: jnp.vdot(jax.vjp(product, x, w)[1](g)[1], changes[1]))(x)
        only = jax.grad(lambda w: jnp.vdot(product(x, w), g))(w)
        return y, pushed, pulled, twice, only

    got, want = (jax.jit(functools.partial(every, product))() for product in products)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_mapped(axes):
    x, w, *products = operands("leading axes")
    stacked = [
        jnp.stack([a, 2 * a, a[::-1]]) if d == 0 else a for a, d in zip((x, w), axes, strict=True)
    ]

    def gradients(product):
        grad = jax.grad(lambda x, w: jnp.sum(product(x, w) ** 2), argnums=(0, 1))
        return jax.jit(jax.vmap(grad, axes))(*stacked)

    got, want = map(gradients, products)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@each_product
def test_nothing_but_the_factors_is_kept(name):
    x, w, own, _ = operands(name)
    kept = jax.tree.leaves(jax.vjp(own, x, w)[1])
    assert sorted(k.shape for k in kept) == sorted([x.shape, w.shape])


def test_rows_are_written_out_on_cpus_alone():
    x, w, own, _ = operands("leading axes")
    pull = jax.jit(lambda x, w, g: jax.vjp(own, x, w)[1](g)).trace(x, w, own(x, w))
    turned = {p: "barrier" in pull.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")}
    assert turned == {"cpu": True, "tpu": False}
